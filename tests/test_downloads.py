"""Archives of data sets: download, verify, unpack."""

import dataclasses
import functools
import http.server
import io
import tarfile
import threading
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torchvision.datasets.utils
from small_data import write_cifar10, write_cifar100, write_tiny_imagenet

from mixmo_fastai.data.archives import extract, fetch
from mixmo_fastai.data.cifar import CIFAR10, CIFAR100, read_cifar100
from mixmo_fastai.data.sources import SOURCES, dataset_status, load_source
from mixmo_fastai.errors import InputError

WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tinyimagenet": write_tiny_imagenet,
}


@pytest.fixture
def register(monkeypatch):
    """Return a function that replaces a data set's archive by a generated one."""

    def replace(archive):
        source = dataclasses.replace(SOURCES[archive.dataset], archive=archive)
        monkeypatch.setitem(SOURCES, archive.dataset, source)

    return replace


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)


@pytest.fixture
def server(tmp_path):
    """Serve a folder on localhost; yield the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("name", WRITERS)
def test_archive_is_verified_and_unpacked(tmp_path, register, name):
    archive = WRITERS[name](tmp_path, packed=True)
    register(archive)
    assert dataset_status(name, tmp_path).detail == "unpacked on first use"
    source = load_source(name, tmp_path, download=False)
    assert len(source.train) > len(source.test) > 0
    expected = "present; its files have no checksums" if name == "tinyimagenet" else "intact"
    assert dataset_status(name, tmp_path).detail.startswith(expected)
    left = {path.name for path in tmp_path.iterdir()} - {"mixmo-cache"}
    assert left == {archive.folder, archive.file_name}


@pytest.mark.parametrize("name", WRITERS)
def test_archive_with_wrong_checksum_is_not_unpacked(tmp_path, name):
    archive = WRITERS[name](tmp_path, packed=True)
    with pytest.raises(InputError, match="differs from its checksum") as caught:
        load_source(name, tmp_path)
    assert archive.file_name in str(caught.value)
    assert dataset_status(name, tmp_path).state == "damaged"
    assert not (tmp_path / archive.folder).exists()


@pytest.mark.parametrize("name", WRITERS)
def test_failed_download_names_the_file_its_address_and_its_folder(tmp_path, offline, name):
    with pytest.raises(InputError, match="Name or service not known") as caught:
        load_source(name, tmp_path)
    archive = SOURCES[name].archive
    for part in (archive.file_name, archive.url, str(tmp_path)):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_downloading_can_be_disabled(tmp_path):
    with pytest.raises(InputError, match=r"downloading is disabled(.|\n)*cifar-10-python\.tar\.gz"):
        load_source("cifar10", tmp_path / "missing", download=False)
    assert not (tmp_path / "missing").exists()


def test_archive_is_downloaded(tmp_path, server):
    folder, address = server
    archive = write_cifar100(folder, packed=True)
    archive = dataclasses.replace(archive, url=f"{address}/{archive.file_name}")
    data_dir = tmp_path / "data_dir"
    source = read_cifar100(fetch(archive, data_dir))
    assert len(source.train) == 200
    assert {path.name for path in data_dir.iterdir()} == {archive.file_name, archive.folder}


def test_two_processes_download_once(tmp_path, server, monkeypatch):
    """The second one waits for the first, in a thread with the lock of another process."""
    folder, address = server
    archive = write_cifar100(folder, packed=True)
    archive = dataclasses.replace(archive, url=f"{address}/{archive.file_name}")
    data_dir, begun, may_end, calls = (
        tmp_path / "data_dir",
        threading.Event(),
        threading.Event(),
        [],
    )
    download = torchvision.datasets.utils.download_url

    def slow(*arguments, **settings):
        calls.append(arguments)
        begun.set()
        assert may_end.wait(60)
        download(*arguments, **settings)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fetch, archive, data_dir)
        assert begun.wait(60)
        second = pool.submit(fetch, archive, data_dir)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.5)
        may_end.set()
        folders = {each.result(timeout=60).folder for each in (first, second)}
    assert folders == {data_dir / archive.folder}
    assert len(calls) == 1
    assert {path.name for path in data_dir.iterdir()} == {archive.file_name, archive.folder}


def test_data_folder_that_is_not_writable_is_named_with_the_file(tmp_path, monkeypatch):
    """As root, no folder is read-only."""

    def refuse(*_):
        raise InputError("Cannot write it: Permission denied.")

    monkeypatch.setattr("mixmo_fastai.data.archives.starting", refuse)
    with pytest.raises(
        InputError, match=r"downloading it failed \(Cannot write it: Perm"
    ) as caught:
        fetch(CIFAR10, tmp_path)
    for part in (CIFAR10.file_name, CIFAR10.url, str(tmp_path)):
        assert part in str(caught.value)


def test_download_with_wrong_checksum_is_removed(tmp_path, server):
    folder, address = server
    archive = write_cifar100(folder, packed=True)
    wrong = dataclasses.replace(archive, url=f"{address}/{archive.file_name}", md5="0" * 32)
    with pytest.raises(InputError, match="downloading it failed"):
        fetch(wrong, tmp_path / "data_dir")
    assert list((tmp_path / "data_dir").iterdir()) == []


def test_data_folder_that_is_a_file_is_refused(tmp_path, offline):
    (tmp_path / "data_dir").touch()
    with pytest.raises(InputError, match="is a file"):
        load_source("cifar10", tmp_path / "data_dir")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..\\out", "C:out"])
def test_archive_writes_no_file_outside_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "x")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    for file in ("a.zip", "a.tar.gz"):
        with pytest.raises(InputError, match="leaves the folder"):
            extract(tmp_path / file, tmp_path / "in")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.zip", "a.tar.gz", "in"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_archive_may_contain_only_regular_files(tmp_path, kind):
    member = tarfile.TarInfo("member")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(InputError, match="'member' is not a regular file"):
        extract(tmp_path / "a.tar", tmp_path / "in")


def test_status_of_data_sets(tmp_path, register):
    assert dataset_status("digits", tmp_path).state == "present"
    for name in WRITERS:
        status = dataset_status(name, tmp_path)
        assert (status.state, status.place) == ("absent", tmp_path / SOURCES[name].archive.folder)
    register(write_cifar10(tmp_path))
    assert dataset_status("cifar10", tmp_path).state == "present"
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    status = dataset_status("cifar10", tmp_path)
    assert status.state == "damaged"
    assert "test_batch differs" in status.detail
    with pytest.raises(InputError, match="Did you mean 'cifar10'"):
        dataset_status("cifar-10", tmp_path)


def test_official_checksums_are_those_of_torchvision():
    from torchvision import datasets

    for own, official in ((CIFAR10, datasets.CIFAR10), (CIFAR100, datasets.CIFAR100)):
        expected = dict(official.train_list + official.test_list)
        expected[official.meta["filename"]] = official.meta["md5"]
        assert own.members == expected
        assert (own.url, own.md5, own.folder) == (
            official.url,
            official.tgz_md5,
            official.base_folder,
        )
