"""The cache: Arrow tables of rows and of tokens, named by their content, and files from URLs.

Tables are memory-mapped, so that a second run makes nothing again, and a large data set needs no memory.
"""

import os
import re
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from classifier.files import digest, write_text
from classifier.messages import BadInput


def cache_folder():
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "text-classification-scripts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table_path(key):
    return cache_folder() / f"{key}.arrow"


def load_table(key):
    """Return the table named `key` of the cache: a Dataset, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(table_path(key)))


def write_table(key, schema, columns):
    """Write the table named `key`: `columns` yields those of some rows at a time. The file is complete or absent."""
    import pyarrow as pa

    path = table_path(key)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for some in columns:
                writer.write_batch(pa.RecordBatch.from_pydict(some, schema=schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_table(key, schema, make_columns):
    """Return (Dataset, made): the table named `key` from the cache, written by make_columns() where it is not there."""
    made = not table_path(key).exists()
    if made:
        write_table(key, schema, make_columns())
    return load_table(key), made


def one_process_at_a_time():
    """A lock for preparing data: one process of a machine makes the tables, the others wait and read its cache."""
    from filelock import FileLock

    # Not a barrier: a process that waits there dies of the collective's timeout when the data are large.
    return FileLock(cache_folder() / "prepare.lock")


def arrow_column(rows, column):
    """Return a column of a Dataset as one Arrow array."""
    values = rows.data.column(column).combine_chunks()
    # rows[column] would make a Python object of each index of a selection: slow, and gigabytes for millions of rows.
    return values if rows._indices is None else values.take(rows._indices.column(0).combine_chunks())


def column_array(rows, column):
    """Return a column of a Dataset as an array: shape (rows,); the labels in multi-label: (rows, labels)."""
    values = arrow_column(rows, column)
    if hasattr(values, "offsets"):  # lists
        return values.flatten().to_numpy().reshape(len(rows), -1)
    return values.to_numpy(zero_copy_only=False)


def download_file(url, refresh):
    """Return the path of a URL's file in the cache, downloaded once; a part after :: names a member of an archive."""
    url, mark, member = url.partition("::")
    path = cache_folder() / "downloads" / digest(url) / Path(url.partition("?")[0]).name
    if refresh or not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
                length = answer.headers["Content-Length"]
                if length and file.tell() != int(length):  # read() of a part of an answer does not complain
                    raise OSError(f"the connection ended after {file.tell():,} of {int(length):,} bytes")
            os.replace(temporary, path)
        # URLError and HTTPError are OSErrors; ValueError: not a URL; HTTPException: an answer that is none.
        except (OSError, ValueError, HTTPException) as error:
            words = str(error).removeprefix("<urlopen error ").removesuffix(">")
            raise BadInput(
                f"{url}: cannot be downloaded ({words})", "Check the address, or download it and give the file's path."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
    return f"{path}{mark}{member}"


def download(path, name, commit):
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return load_dataset(path, name, revision=commit)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        words = f"{path}{f' ({name})' if name else ''}: {' '.join(str(error).split())[:300]}"
        raise BadInput(words, "Check `dataset: {path, name}` of the task.") from None
    except (OSError, HTTPError) as error:  # ConnectionError is an OSError
        raise unreachable_hub(path, error) from None


def hub_commit(repository, kind, revision=None, refresh=False):
    """Return the commit of a Hub repository: the one it had when it was first used here; `refresh` asks the Hub again.

    kind is "model" or "dataset"; a revision that is a commit needs no asking.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    pin = cache_folder() / f"{kind}s--{repository}--{revision or 'main'}.commit".replace("/", "--")
    if pin.exists() and not refresh:
        return pin.read_text()
    try:
        commit = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):  # the first: or it is gated
        raise BadInput(
            f'the Hub has no {kind} "{repository}"{f" at {revision}" if revision else ""} that you may read',
            f"Check the name, log in with `hf auth login`, or give a {'folder' if kind == 'model' else 'file'}.",
        ) from None
    except (OSError, HTTPError) as error:  # HTTPError is of the library underneath: a refused connection, a time-out
        # Somebody may have downloaded it with another tool, for a cluster's compute nodes without a network.
        known = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "refs", revision or "main")
        if not known.exists():
            raise unreachable_hub(repository, error) from None
        commit = known.read_text().strip()
    write_text(pin, commit)
    return commit


def was_loaded(repository, commit):
    """Return whether a model was loaded whole from the Hub before, at this commit, and is still in the cache."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return _mark(repository, commit).exists() and Path(constants.HF_HUB_CACHE, folder, "snapshots", commit).is_dir()


def note_loaded(repository, commit):
    """Note for was_loaded that all files of a model are in the cache: a download that broke off leaves a part."""
    write_text(_mark(repository, commit), commit)


def _mark(repository, commit):
    return cache_folder() / f"model--{repository.replace('/', '--')}--{commit}.loaded"


def unreachable_hub(repository, error):
    from huggingface_hub import constants

    words = " ".join(str(error).split())[:200]
    return BadInput(
        f"cannot download {repository} from {constants.ENDPOINT} ({words})",
        "Check the network or set HF_ENDPOINT to a mirror, give local files (--train_file, --model FOLDER), "
        "or try `--task demo`, which needs no network.",
    )
