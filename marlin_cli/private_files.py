"""Folders and files that nobody but this user can have written: code is loaded from no others. POSIX owners and modes."""

import contextlib
import fcntl
import grp
import hashlib
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path


class NotPrivate(Exception):
    """Another user could have written what is there; the message names it, says why, and how to mend it."""


def make_private_folder(path: Path) -> Path:
    """The folder at `path` without links, made with mode 0700 where it is not there, as are its parents.

    The rule is that of sshd for the files that decide who gets in: the folder is this user's or root's, and neither its
    group nor others may write in it. Nor in any folder above, as they could put another one in its place, unless its
    sticky bit lets nobody rename what is not his own, as in /tmp. A group of one user's own, which some systems give to
    each, counts as that user.

    Raises:
        NotPrivate: see above.
        OSError: it cannot be made.
    """
    path = path.resolve()
    for each in reversed([path, *path.parents]):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
        status = each.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(20, "Not a directory", str(each))
        # In a container all that lies above may be of a user that it does not know, as / is.
        if each == path or status.st_uid != Path("/").stat().st_uid:
            _check_owner(each, status)
        if each == path or not status.st_mode & stat.S_ISVTX:
            _check_mode(each, status)
    return path


def open_private(path: Path) -> int:
    """A descriptor to read a file that only this user can have written; a link is not followed, and a pipe not waited for.

    Raises:
        NotPrivate: it is no regular file, another user's, or others may write it.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if path.is_symlink():
            raise NotPrivate(f"{path} is a link; remove it") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotPrivate(f"{path} is no regular file; remove it")
        _check_owner(path, status)
        _check_mode(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def sha256_of_private(path: Path) -> str:
    """Hexadecimal SHA-256 of a file that `open_private` opens.

    Raises:
        NotPrivate, OSError: as `open_private`.
    """
    with open(open_private(path), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read_private(path: Path, most_bytes: int) -> bytes:
    """The first bytes of a file that `open_private` opens.

    Raises:
        NotPrivate, OSError: as `open_private`.
    """
    with open(open_private(path), "rb") as file:
        return file.read(most_bytes)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`, in a private folder; one process at a time does, the others wait.

    Raises:
        NotPrivate: a link or something else stands there.
        OSError: it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError:
        if path.is_symlink():
            raise NotPrivate(f"{path} is a link; remove it") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotPrivate(f"{path} is no regular file; remove it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise NotPrivate(f"{path} belongs to user {status.st_uid}, and this is user {os.geteuid()}; remove it or name another")


def _check_mode(path: Path, status: os.stat_result) -> None:
    by_others, by_group = status.st_mode & stat.S_IWOTH, status.st_mode & stat.S_IWGRP
    if by_others or (by_group and not _is_own_group(status.st_gid)):
        who = "everybody" if by_others else f"group {status.st_gid}"
        raise NotPrivate(f"{path} can be written by {who}; chmod go-w it")


def _is_own_group(number: int) -> bool:
    """Is this a group with nobody in it but this user?"""
    try:
        user = pwd.getpwuid(os.geteuid())
        return user.pw_gid == number and user.pw_name == grp.getgrgid(number).gr_name and not grp.getgrgid(number).gr_mem
    except KeyError:
        return False
