"""The run folder: save and resume."""

import contextlib
import hashlib
import json
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from buffer import pack, unpack
from machine.folders import BadInput, flush, new_folder, write_json


def to_disk(value, path):
    """Write nested dicts and lists of tensors, arrays and plain values as path.json and path.safetensors. No pickle."""
    tensors = {}

    def walk(v, name):
        if isinstance(v, (torch.Tensor, np.ndarray)):
            tensors[name] = torch.from_numpy(v) if isinstance(v, np.ndarray) else v.detach().cpu().contiguous()
            return {"#array" if isinstance(v, np.ndarray) else "#tensor": name}
        if isinstance(v, dict):
            return {k: walk(x, f"{name}.{k}") for k, x in v.items()}
        return [walk(x, f"{name}.{i}") for i, x in enumerate(v)] if isinstance(v, (list, tuple)) else v

    plain = walk(value, path.name)
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(plain), "utf-8")



def from_disk(path):
    """What `to_disk` wrote."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def walk(v):
        if isinstance(v, dict):
            if "#tensor" in v:
                return tensors[v["#tensor"]]
            return tensors[v["#array"]].numpy() if "#array" in v else {k: walk(x) for k, x in v.items()}
        return [walk(x) for x in v] if isinstance(v, list) else v

    return walk(json.loads(path.with_suffix(".json").read_text("utf-8")))



def write_checkpoint(folder, parts, keep, world):
    """folder (checkpoint/step-N) from (name, value) parts and a manifest: written beside, flushed to disk, then renamed.

    All processes walk through `parts`, as divided tensors are gathered on the way; rank 0 writes.
    """
    with new_folder(folder) if world.first else contextlib.nullcontext() as temporary:
        for name, value in parts:
            if world.first:
                to_disk(value, temporary / name)
        if world.first:
            write_json(temporary / "manifest.json", {p.name: [p.stat().st_size, checksum(p)] for p in sorted(temporary.iterdir())})
    if world.first:
        flush(folder.parent.parent)
        for old in sorted(p for p in folder.parent.glob("step-*") if p.name <= folder.name)[:-keep]:         # a later one is torn, and does not count
            shutil.rmtree(old, ignore_errors=True)
    world.all(None)



def checksum(path, size=None):
    """SHA-256 of a file, or of its first `size` bytes."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read(size)).hexdigest() if size else hashlib.file_digest(f, "sha256").hexdigest()



def newest_checkpoint(out):
    """The newest sound checkpoint folder of a run, or None if there is none at all; a torn one is named and passed over."""
    folders = sorted((out / "checkpoint").glob("step-*"), reverse=True)
    for folder in folders:
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            for name in {*manifest, "shared.json", "shared.safetensors", "rank-0.json", "rank-0.safetensors"}:
                if [(folder / name).stat().st_size, checksum(folder / name)] != manifest.get(name):
                    raise ValueError(f"{name} is not what was written")
            return folder
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(f"warning: passing over {folder}: {error}", file=sys.stderr)
    if folders:
        raise BadInput(f"{out / 'checkpoint'}: none of the checkpoints is whole; put one back, or delete this folder to begin again")



def lock(out):
    """Take a run folder for this process, until the file that this returns is closed; refused while another process has it."""
    with contextlib.suppress(ImportError):               # not on Windows
        import fcntl
        file = open(out / "config.json", "rb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BadInput(f"{out}: another process is writing this run; wait for it, or stop it first") from None
        except OSError:                                  # a file system without locks
            pass
        return file



def clear_up(out):
    """Delete what a killed process was about to write in a run folder."""
    for path in [path for pattern in ("*.tmp", ".*.old", "checkpoint/*.tmp", "checkpoint/.*.old") for path in out.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()



def deal(parts, batch_size, world):
    """One process's part of a run saved by len(parts) processes, dealt out again if that was another number.

    Buffer: all pairs, oldest first, one to each process in turn. Written ahead: batch by batch, likewise. Held out: by
    row. No pair is lost or doubled. Generators are new then; with as many processes as before they go on bit for bit.
    """
    if len(parts) == world.size:
        return parts[world.rank]
    mine, own = slice(world.rank, None, world.size), {}
    buffers = [unpack(p["buffer"]["pairs"]) for p in parts]
    pairs = sorted((pair for b in buffers for pair in b), key=lambda pair: pair.step)[mine]
    own["buffer"] = {"capacity": sum(p["buffer"]["capacity"] for p in parts) // world.size, "pairs": pack(pairs), "rng": None}
    written, each = [unpack(p["written"]) for p in parts], batch_size // len(parts)
    batches = range(0, len(written[0]), each)
    own["written"] = pack([pair for i in batches for pair in [pair for w in written for pair in w[i:i + each]][mine]])
    gaps = [p["gaps"] or [None] * len(unpack(p["held"])) for p in parts]
    held = sorted(((q, gap) for p, g in zip(parts, gaps) for q, gap in zip(unpack(p["held"]), g)), key=lambda x: x[0].row)[mine]
    own |= {"held": pack([q for q, _ in held]), "gaps": [gap for _, gap in held if gap is not None], "cuts": None, "sampler": None}
    return own
