"""Train Cut-MixMo with two members on scikit-learn's digits, in a plain PyTorch loop.

The loop follows section 3 of the paper (Ramé, Sun, Cord, "MixMo", ICCV 2021): pair the images, draw
masks, mix the features, weight the losses. It takes about a minute on one CPU core, on busy cores
only with OMP_NUM_THREADS=1, and ends with

    epoch 15: test accuracy 98.87%
"""

import argparse

import torch
from torch.nn.functional import cross_entropy

from mixmo_fastai.data.sources import load_source
from mixmo_fastai.mixing import draw_lam, draw_masks, loss_weights, mix_features
from mixmo_fastai.mixing.pairing import draw_pairing
from mixmo_fastai.models import create_model

MEMBERS, REPETITIONS, IMAGES = 2, 4, 16  # M, b and n: the network sees B = b · n = 64 positions
ALPHA, MIX_PROB, DECAY_START, ROOT = 2.0, 0.5, 11 / 12, 3.0


def training_loss(model, x, y, progress):
    """Compute the loss of n images (n, C, H, W) with labels (n,); progress is in [0, 1]."""
    # Pair the images: every member sees every image b times, in an independent random order.
    indices = draw_pairing(len(x), MEMBERS, REPETITIONS) % len(x)  # (B, M), image at each position
    inputs, targets = x[indices], y[indices]  # (B, M, C, H, W) and (B, M)
    # Mix the features: with boxes, with a probability that decays at the end; otherwise linearly.
    prob = MIX_PROB * min(1.0, (1 - progress) / (1 - DECAY_START))
    kind = "cutmix" if torch.rand(()) < prob else "linear"
    features = torch.stack([model.encoders[i](inputs[:, i]) for i in range(MEMBERS)], dim=1)
    masks, means = draw_masks(kind, draw_lam(len(indices), MEMBERS, ALPHA), features.shape[2:])
    embedding = model.core(mix_features(features, masks))
    # Weight the losses: each head predicts the label of its member's image.
    losses = torch.stack(
        [cross_entropy(model.heads[i](embedding), targets[:, i], reduction="none")
         for i in range(MEMBERS)], dim=1,
    )  # fmt: skip
    return (loss_weights(means, ROOT) * losses).sum(dim=1).mean()


def main():
    """Train and print the test accuracy of the ensemble after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    source = load_source("digits")
    x, test_x = ((part.pixels / 255 - 0.3) / 0.38 for part in (source.train, source.test))
    y = source.train.labels
    model = create_model("wrn10_2", num_classes=10, num_members=MEMBERS, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=6e-4, nesterov=True)
    steps = epochs * (len(y) // IMAGES)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(y)).split(IMAGES):
            if len(batch) == IMAGES:  # skip the last, incomplete batch
                loss = training_loss(model, x[batch], y[batch], scheduler.last_epoch / steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
        model.eval()
        with torch.no_grad():  # all encoders see the same image; the logits are averaged
            correct = model(test_x).argmax(dim=1) == source.test.labels
        print(f"epoch {epoch + 1}: test accuracy {correct.float().mean():.2%}")


if __name__ == "__main__":
    main()
