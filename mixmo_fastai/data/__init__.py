"""Data sets, image folders and loaders.

sources                       data sets by name or folder
digits, cifar, tiny_imagenet  one data set each; archives: download and verify official archives
image_sets                    images and labels of the training, validation and test set
image_folder                  image folders; layout, class_folders, listing: find their images
chosen_images, parts          which images of a folder are used, as stored in split.json
class_files, class_names      files by class: draw a test set, compare with those of a run; names
label_tables, table_images    tables of labels with splits and groups; table_columns: find columns
table_rows                    the rows of a table of labels, and checks of them
multi_labels, flag_columns    several labels per image, in one field or in one column each
text_tables, file_finder      CSV and parquet files; the images that they name
hub_dataset                   data sets of the library Hugging Face datasets
decoding, depth, cache        image files to uint8 tensors, once; damage: unreadable files
splits, statistics            validation split, subset; mean and standard deviation
source_checks                 checks of a data source
run_data                      the data set of a recipe, with the split of its run
dataloaders                   DataLoaders from a data source
loaders, cuts, augment        resident and streaming loaders that crop and flip whole batches
pixel_reader                  pixels of a batch in a worker of the streaming loader
transforms                    transforms of training images by name; *_transforms, resized_crop
repeat                        several copies of each image in a batch
items, loose_images           single items for fastai; files to predict; named_images: of tables
label_distributions           votes of annotators; vote_tables, image_names: read and match them
corruptions, fingerprint      corrupted test images; checksums of a data set
first_batch                   the first batch, without changing random states
"""
