"""Where a run lives: a local or shared folder, or any URL that pyarrow or fsspec can open (`s3://…`, `gs://…`).

What is promised. Local and shared folders: a file appears under its name only when it is whole and on the disk
(temporary name in the same folder, fsync, rename), lines of a journal are on the disk when `append` returns, and one
driver at a time holds the lock. Object stores: an object appears when its upload is complete, a journal line is one
small object, and there is no lock, so do not start two drivers on one URL. Other URLs: temporary name, then move.
"""

from vtrial.storage.folder import Folder, open_folder, write_if_new
from vtrial.storage.local import LocalFolder, whole_file, write_atomic
from vtrial.storage.names import expanded, folder_name, place, printable
from vtrial.storage.remote import RemoteFolder

__all__ = [
    "Folder",
    "LocalFolder",
    "RemoteFolder",
    "expanded",
    "folder_name",
    "open_folder",
    "place",
    "printable",
    "whole_file",
    "write_atomic",
    "write_if_new",
]
