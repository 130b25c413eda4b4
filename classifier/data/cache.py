"""The cache: Arrow tables named by a digest of their content, files from URLs, pinned commits of the Hub.

Tables are memory-mapped: a second run recomputes nothing, and a large data set needs no memory.
"""

import os
import re
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from classifier.files import digest, safe_name, temporary_file, write_text
from classifier.messages import BadInput


def cache_folder():
    """Return this project's folder in the cache of `datasets`. Raises BadInput where it cannot be written."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "text-classification-scripts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "Permission denied or read-only")
    except OSError as error:
        reason = f"{folder}: the cache cannot be written there ({error.strerror})"
        raise BadInput(reason, "Set the environment variable HF_HOME to a folder that can be written.") from None
    return folder


# -------------------------------------------------------------------------------------------------------------- tables


def table_path(key):
    return cache_folder() / f"{key}.arrow"


def load_table(key):
    """Return the cached table named `key`: a memory-mapped Dataset."""
    from datasets import Dataset

    return Dataset.from_file(str(table_path(key)))


def write_table(key, schema, columns):
    """Write the table named `key` atomically; `columns` yields {column: values} of some rows at a time."""
    import pyarrow as pa

    with (
        temporary_file(table_path(key)) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in columns:
            writer.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))


def cached_table(key, schema, columns):
    """Return (Dataset, whether it is new) of the table named `key`, written by write_table where it is not cached."""
    is_new = not table_path(key).exists()
    if is_new:
        write_table(key, schema, columns)
    return load_table(key), is_new


def one_process_at_a_time():
    """Return a lock for preparing data: one process of a machine makes the tables, the others wait and read them."""
    from filelock import FileLock

    # Not a barrier: with large data, processes waiting at one would hit the collective's timeout.
    return FileLock(cache_folder() / "prepare.lock")


def arrow_column(rows, column):
    """Return a column of a Dataset as one Arrow array."""
    values = rows.data.column(column).combine_chunks()
    # rows[column] would make a Python object of each index of a selection: slow, and gigabytes for millions of rows.
    return values if rows._indices is None else values.take(rows._indices.column(0).combine_chunks())


def column_array(rows, column):
    """Return a column of a Dataset as an array, shape (rows,); lists, such as multi-label labels: (rows, labels)."""
    values = arrow_column(rows, column)
    if hasattr(values, "offsets"):  # lists
        return values.flatten().to_numpy().reshape(len(rows), -1)
    return values.to_numpy(zero_copy_only=False)


# ----------------------------------------------------------------------------------------------------- files from URLs


def download_file(url, refresh):
    """Return the path of a URL's file in the cache, downloaded once; a suffix ::MEMBER of the URL is kept.

    Raises BadInput where the file cannot be downloaded completely.
    """
    url, mark, member = url.partition("::")
    name = Path(url.partition("?")[0]).name[-60:]  # its end says the format
    path = cache_folder() / "downloads" / digest(url) / safe_name(name, limit=240)
    if refresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary_file(path) as temporary:
                _fetch(url, temporary)
        # URLError and HTTPError are OSErrors; ValueError: not a URL; HTTPException: not an HTTP answer.
        except (OSError, ValueError, HTTPException) as error:
            reason = f"{url}: cannot be downloaded ({str(error).removeprefix('<urlopen error ').removesuffix('>')})"
            raise BadInput(reason, "Check the address, or download it and give the file's path.") from None
    return f"{path}{mark}{member}"


def _fetch(url, path):
    """Download a URL's content into a file. Raises OSError where it is not complete."""
    with urlopen(url, timeout=60) as answer, open(path, "wb") as file:
        shutil.copyfileobj(answer, file)
        length = answer.headers["Content-Length"]
        if length and file.tell() != int(length):  # read() raises nothing where the connection ends early
            raise OSError(f"the connection ended after {file.tell():,} of {int(length):,} bytes")


# ------------------------------------------------------------------------------------------------------------- the Hub


def download(path, name, commit):
    """Return the DatasetDict of a Hub data set's configuration at a commit. Raises BadInput."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return load_dataset(path, name, revision=commit)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        reason = f"{path}{f' ({name})' if name else ''}: {' '.join(str(error).split())[:300]}"
        raise BadInput(reason, "Check `dataset: {path, name}` in the task.") from None
    except (OSError, HTTPError) as error:  # ConnectionError is an OSError
        raise unreachable_hub(path, error) from None


def hub_commit(repository, kind, revision=None, refresh=False):
    """Return the commit of a Hub repository, pinned when it was first used here; `refresh` asks the Hub again.

    kind: "model" or "dataset". A revision that is a commit is returned without a request. Raises BadInput.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    name = f"{kind}s--{repository}--{revision or 'main'}".replace("/", "--")
    pin = cache_folder() / f"{safe_name(name, limit=200)}.commit"
    if pin.exists() and not refresh:
        return pin.read_text(encoding="utf-8")
    try:
        commit = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=30).sha
    # RepositoryNotFoundError is also raised for a gated repository.
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise BadInput(
            f'the Hub has no {kind} "{repository}"{f" at {revision}" if revision else ""} that you may read',
            f"Check the name, log in with `hf auth login`, or give a {'folder' if kind == 'model' else 'file'}.",
        ) from None
    except (OSError, HTTPError) as error:  # HTTPError: from the HTTP library, a refused connection or a timeout
        # Another tool may have downloaded it, for a cluster's compute nodes without a network.
        known = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "refs", revision or "main")
        if not known.exists():
            raise unreachable_hub(repository, error) from None
        commit = known.read_text(encoding="utf-8").strip()
    write_text(pin, commit)
    return commit


def was_loaded(repository, commit):
    """Return whether a model was completely downloaded at this commit before, and is still in the cache."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return _marker(repository, commit).exists() and Path(constants.HF_HUB_CACHE, folder, "snapshots", commit).is_dir()


def note_loaded(repository, commit):
    """Record for was_loaded that all files of a model are cached; an interrupted download leaves only some of them."""
    write_text(_marker(repository, commit), commit)


def _marker(repository, commit):
    return cache_folder() / f"model--{repository.replace('/', '--')}--{commit}.loaded"


def unreachable_hub(repository, error):
    """Return the BadInput for a Hub that cannot be reached."""
    from huggingface_hub import constants

    return BadInput(
        f"cannot download {repository} from {constants.ENDPOINT} ({' '.join(str(error).split())[:200]})",
        "Check the network or set HF_ENDPOINT to a mirror, give local files (--train_file, --model FOLDER), "
        "or try `--task demo`, which needs no network.",
    )
