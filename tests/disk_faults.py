"""Stand-ins for module os: a process that is killed, a disk that loses power."""

import os
import signal

from mixmo_fastai.runs import files

OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "replace", "link", "unlink", "rmdir")
CONTENT = [("state.json", b'{"a": 1}'), ("model.safetensors", bytes(range(256)) * 40)]


class KillingOs:
    """Stand-in for module os in `files` that kills the process at its n-th disk operation.

    With `half`, a killed write has written half of its content.
    """

    def __init__(self, fatal=None, *, half=False):
        self.fatal, self.half, self.count = fatal, half, 0

    def __getattr__(self, name):
        original = getattr(os, name)
        return (lambda *args: self.do(name, original, args)) if name in OPERATIONS else original

    def do(self, name, original, args):
        self.count += 1
        if self.count == self.fatal:
            if name == "write" and self.half:
                original(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)


def run_and_kill(action, fatal, *, half=False):
    """Run an action in a process that is killed at its n-th operation; return whether it was."""
    child = os.fork()
    if child == 0:
        files.os = KillingOs(fatal, half=half)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class DiskRecorder:
    """Stand-in for module os in `files` that records what is durable on disk.

    A file's content is durable once the file is flushed, a name once its folder is flushed.
    """

    def __init__(self):
        self.paths, self.dirty, self.unnamed, self.renames = {}, set(), {}, []

    def __getattr__(self, name):
        original = getattr(os, name)
        return getattr(self, f"do_{name}", original) if name in OPERATIONS else original

    def do_open(self, path, *args):
        is_new = not os.path.exists(path)
        handle = os.open(path, *args)
        self.paths[handle] = str(path)
        if is_new:
            self.unnamed.setdefault(os.path.dirname(path), set()).add(str(path))
        return handle

    def do_write(self, handle, content):
        self.dirty.add(self.paths[handle])
        return os.write(handle, content)

    def do_mkdir(self, path):
        os.mkdir(path)
        self.unnamed.setdefault(os.path.dirname(path), set()).add(str(path))

    def do_fsync(self, handle):
        os.fsync(handle)
        self.dirty.discard(self.paths[handle])
        self.unnamed.pop(self.paths[handle], None)

    def do_rename(self, source, target):
        self.move(os.rename, source, target)

    def do_replace(self, source, target):
        self.move(os.replace, source, target)

    def move(self, operation, source, target):
        inside = {path for path in self.dirty if path.startswith(str(source))}
        assert not inside, "renamed before its content was flushed"
        assert not self.unnamed.get(str(source)), "renamed before its names were flushed"
        operation(source, target)
        self.renames.append(str(target))
        self.unnamed.setdefault(os.path.dirname(target), set()).add(str(target))

    def do_unlink(self, path):
        os.unlink(path)
        self.dirty.discard(str(path))
        for names in self.unnamed.values():
            names.discard(str(path))

    def do_rmdir(self, path):
        if str(path) not in self.renames[-1:]:
            assert not self.unnamed.get(os.path.dirname(path), set()) - {str(path)}, (
                "removed before the name of what replaces it was flushed"
            )
        os.rmdir(path)

    def do_link(self, source, target):
        assert str(source) not in self.dirty
        os.link(source, target)
        self.unnamed.setdefault(os.path.dirname(target), set()).add(str(target))
