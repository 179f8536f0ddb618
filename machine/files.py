"""Files: JSON in and out, folders that are whole or not there, and BadInput."""

import errno
import json
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


class BadInput(ValueError):
    """Something handed to us cannot be used; the message is one sentence that says what to do."""
    code = 2        # the exit code


def paths_of(value):
    """The paths that a setting names: one that exists, whatever is in its name, or several between commas."""
    parts = [value] if os.path.exists(value) or not value else [part.strip() for part in value.split(",")]
    if "" in parts[1:] or len(parts) > 1 and not parts[0]:
        raise BadInput(f"{value!r}: a path between commas is empty; take the comma out")
    return parts


def parse_json(content, where, objects=None):
    """The value of JSON bytes, objects made of their pairs by `objects`; or BadInput, `where` first."""
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=objects)
        if b"\\ud" in content.lower():                   # half a surrogate pair is JSON, but it is not text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeError:
        raise BadInput(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({str(error)[:80]})") from None


def read_json(path, what="file"):
    """The value of a JSON file, or BadInput."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file; a {what} needs it")
    if not os.path.isfile(path):
        raise BadInput(f"{path}: not a file")            # a pipe would be waited for
    try:
        return parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def write_whole(path, text):
    """A text file that is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def write_json(path, value):
    """Pretty JSON, whole or not there."""
    write_whole(Path(path), to_json(value, indent=2) + "\n")


def to_json(value, **how):
    """A value as JSON, which has null for a number that is not finite."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, ensure_ascii=False, **how)


def plain_file(path):
    """The path of a run's file, if it is one or there is none. BadInput otherwise: a pipe would be waited
    for, and a link leads elsewhere."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise BadInput(f"{path}: not a plain file; put back what the run wrote")
    return path


@contextmanager
def new_folder(folder, replace=True):
    """A temporary folder to write into, named `folder` at the end, once the disk holds it: whole or not
    there.

    What had that name makes way, and is deleted after, or put back where nothing took its place. Without
    `replace` it stays: the name must be free, or an empty folder's, and one of several processes gets it, in
    one step, the others BadInput. What fails is deleted: a full disk needs room.
    """
    folder = Path(folder)
    own = "" if replace else f".{secrets.token_hex(4)}"
    temporary, old = folder.with_name(f".{folder.name}{own}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if replace and folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        with suppress(OSError):
            folder.rmdir()                               # if it is empty
        temporary.rename(folder)                         # which a folder that holds anything withstands
        flush(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and error.filename2:           # of the rename
            raise BadInput(f"{folder}: another process has just taken this name; choose another") from None
        raise
    finally:
        if replace and old.exists() and not folder.exists():
            old.rename(folder)
        for path in (temporary, old) if replace else (temporary,):
            shutil.rmtree(path, ignore_errors=True)


def flush(path):
    """Have the disk hold what was written (a folder too, where the system and the file system allow it)."""
    folder = Path(path).is_dir()
    with suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)     # Windows flushes what it may write
        try:
            os.fsync(handle)
        except OSError as error:                         # CIFS and FUSE cannot; a failing disk says EIO
            if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(handle)
