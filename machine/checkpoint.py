"""The run folder: who may have it, what is saved in it, and how a run goes on from there.

A checkpoint is safetensors and JSON, no pickle: checkpoint/step-N/ has a file for each model, for the
optimizer, for what all processes share and for what each has of its own, and a manifest with checksums. It is
whole or not there. Rank 0 writes, and gathers shards one tensor at a time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from buffer import pack, unpack
from machine.files import BadInput, flush, new_folder, paths_of, plain_file, write_json
from machine.flags import LAYOUT, PATHS, flag_of
from machine.folders import shard_like
from model import unshard
from sapo import stream


# ------------------------------------------------------------------------------- one part
def to_disk(value, name, folder):
    """Write nested dicts and lists of tensors, arrays and plain values as name.json and name.safetensors.

    All processes call this, since shards are gathered together; one whose `folder` is None keeps nothing.
    """
    tensors = {}

    def walk(v, key):
        if isinstance(v, np.ndarray):
            tensors[key] = torch.from_numpy(v)
            return {"#array": key}
        if isinstance(v, torch.Tensor):
            whole = unshard(v.detach())
            if folder:
                tensors[key] = whole.cpu().contiguous()
            return {"#tensor": key}
        if isinstance(v, dict):
            return {k: walk(x, f"{key}.{k}") for k, x in v.items()}
        return [walk(x, f"{key}.{i}") for i, x in enumerate(v)] if isinstance(v, (list, tuple)) else v

    plain = walk(value, name)
    if folder:
        save_file(tensors, folder / f"{name}.safetensors")
        tensors.clear()      # which `walk`, holding itself, would keep until the garbage is collected
        (folder / f"{name}.json").write_text(json.dumps(plain), "utf-8")


def from_disk(folder, name):
    """What `to_disk` wrote."""
    with safe_open(folder / f"{name}.safetensors", "pt") as f:
        def walk(v):
            if isinstance(v, list):
                return [walk(x) for x in v]
            if not isinstance(v, dict):
                return v
            if "#array" in v:
                return f.get_tensor(v["#array"]).numpy()
            return f.get_tensor(v["#tensor"]) if "#tensor" in v else {k: walk(x) for k, x in v.items()}

        return walk(json.loads((folder / f"{name}.json").read_text("utf-8")))


def tensors_of(folder, name):
    """(key, tensor) of each tensor that `to_disk` wrote for a dict, one at a time."""
    with safe_open(folder / f"{name}.safetensors", "pt") as f:
        for key in f.keys():
            yield key.removeprefix(f"{name}."), f.get_tensor(key)


def load_optimizer(folder, model, optimizer):
    """Give an optimizer its state back, whatever the number of processes then and now."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    numbers, state = {name: i for i, name in enumerate(named)}, optimizer.state_dict()
    for key, tensor in tensors_of(folder, "optimizer"):
        name, _, moment = key.rpartition(".")
        moments = state["state"].setdefault(numbers[name], {})
        tensor = shard_like(tensor, named[name]) if tensor.dim() else tensor
        moments[moment] = tensor.clone()                 # else it would be a part of the open file
    optimizer.load_state_dict(state)


# --------------------------------------------------------------------------- a checkpoint
def write_checkpoint(folder, parts, keep, world):
    """Write checkpoint/step-N from {part: value}, of which "own" is this process's. Whole or not there."""
    parts |= {f"rank-{rank}": own for rank, own in enumerate(world.all(parts.pop("own")))}
    with new_folder(folder) if world.first else contextlib.nullcontext() as temporary:
        for name, value in parts.items():
            to_disk(value, name, temporary)
            world.all(None)              # else others wait in NCCL for this disk, which has half an hour
        if world.first:
            files = sorted(temporary.iterdir())
            with ThreadPoolExecutor() as pool:           # hashing leaves the interpreter's lock alone
                sums = pool.map(checksum, files)
                manifest = {p.name: [p.stat().st_size, digest] for p, digest in zip(files, sums)}
            write_json(temporary / "manifest.json", manifest)
    if world.first:
        flush(folder.parent.parent)
        found = checkpoints(folder.parent.parent)
        for path in found[:found.index(folder) + 1][:-max(1, keep)]:         # a later one is torn
            shutil.rmtree(path, ignore_errors=True)
    world.all(None)


def checkpoints(out):
    """The folders checkpoint/step-N of a run, the oldest first; any other name is somebody's own."""
    found = [path for path in (out / "checkpoint").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def checksum(path):
    """SHA-256 of a file of a run."""
    with open(plain_file(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def newest_checkpoint(out):
    """The newest sound checkpoint of a run, or None if there is none; a torn one is named and passed over."""
    folders = checkpoints(out)
    for folder in reversed(folders):
        try:
            manifest = json.loads(plain_file(folder / "manifest.json").read_text("utf-8"))
            for name in {*manifest, "shared.json", "shared.safetensors", "rank-0.json", "rank-0.safetensors"}:
                if [(folder / name).stat().st_size, checksum(folder / name)] != manifest.get(name):
                    raise ValueError(f"{name} is not what was written")
            return folder
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(f"warning: passing over {folder}: {error}", file=sys.stderr)
    if folders:
        raise BadInput(f"{out / 'checkpoint'}: no checkpoint is whole; put one back, or delete the "
                       "folder to begin again")


def find_checkpoint(out, resume, world):
    """The checkpoint to go on from, or None; rank 0 looks, and all must see the same one."""
    found = world.together(lambda: newest_checkpoint(out) if resume and world.first else None)
    found = world.all(found)[0]
    if found:
        seen = found / "manifest.json"
        if len(set(world.all(seen.read_text("utf-8") if seen.is_file() else None))) > 1:
            raise BadInput(f"--resume {resume}: not all processes see {found}; on several nodes copy the run "
                           "folder to each, or share it")
    return found


# ------------------------------------------------------------------------- the run folder
def lock(out):
    """Take a run folder, until the file that this returns is closed; BadInput if another process has it."""
    with contextlib.suppress(ImportError):               # not on Windows
        import fcntl
        file = open(out / "config.json", "r+b")          # NFS locks what may be written
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.path.samestat(os.fstat(file.fileno()), os.stat(out / "config.json"))
        except OSError as error:                         # else a file system without locks
            there = not isinstance(error, (BlockingIOError, FileNotFoundError))
        if not there:                                    # held, or replaced since it was opened
            file.close()
            raise BadInput(f"{out}: another process writes this run; wait for it, or stop it first")
        return file


def may_write(cfg):
    """Refuse to write over anything, above all over what a run reads."""
    out = Path(cfg.out)
    try:
        with contextlib.suppress(FileNotFoundError):
            out.with_name(f".{out.name}.12345678.tmp").lstat()       # where the folder begins to be written
    except (OSError, ValueError) as error:               # too long, with a NUL, below a file, no name at all
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--out {out}: no folder can be made there ({reason}); choose another name") from None
    if not os.access(next(path for path in out.absolute().parents if path.exists()), os.W_OK):
        raise BadInput(f"--out {out}: nothing can be written there; choose another folder")
    if not out.is_symlink() and (not out.exists() or out.is_dir() and not any(out.iterdir())):
        return
    ours = not out.is_symlink() and (out / "config.json").is_file() and (out / "source").is_dir()
    inside = [f"{flag_of(name)} {path}" for name in PATHS for path in paths_of(getattr(cfg, name))
              if path and Path(path).resolve().is_relative_to(out.resolve())]
    for broken, sentence in (
            (not ours, "exists and is not a run folder; it is not replaced even with --overwrite"),
            (not cfg.overwrite, f"exists; go on with --resume {out}, replace it with --overwrite"),
            (inside, f"would be replaced, and with it {''.join(inside[:1])}")):
        if broken:
            raise BadInput(f"--out {out} {sentence}; or choose another name")


def new_run(inputs):
    """Make the run folder of Inputs: config.json has what was asked for, source/ what it is made from.
    Returns its lock. With --overwrite a run that has the name makes way, unless another process holds it."""
    import importlib.metadata as metadata
    libraries = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in libraries}
    cfg, out = inputs.cfg, Path(inputs.cfg.out)
    run = {"layout": LAYOUT, "settings": dataclasses.asdict(cfg), "preset": inputs.preset,
           "steps": inputs.steps, "model_commit": inputs.commit, "data": [d.note for d in inputs.data],
           "eos_token_ids": list(inputs.text.eos), "versions": versions}
    there = cfg.overwrite and (out / "config.json").is_file()
    with there and lock(out) or contextlib.nullcontext(), new_folder(out, replace=there) as temporary:
        (temporary / "source").mkdir()
        for name, content in inputs.files.items():
            (temporary / "source" / name).write_bytes(content)
        write_json(temporary / "source" / "config.json", inputs.config.source)
        write_json(temporary / "config.json", run)
        return lock(temporary)


def clear_up(out):
    """Delete what a killed process was about to write in a run folder."""
    for pattern in ("*.json*.tmp", "checkpoint.tmp", ".*.tmp", ".*.old", "checkpoint/.step-*"):
        for path in list(out.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def foundations(out, base, fingerprints, world):
    """{name: checksum} of what a run stands on and never writes: other on resume, and so were the run.

    base: the model folder of a run with adapters, whose checkpoints do not hold it; else None.
    """
    found = {}
    if world.first:
        files = [out / "config.json", *sorted((out / "source").iterdir())]
        found = {str(path.relative_to(out)): checksum(path) for path in files}
    found = world.all(found)[0] | fingerprints
    if base:
        here = world.local == 0                          # once a node, for its processes
        found["model"] = {path.name: checksum(path.resolve()) for path in base.glob("*.safetensors") if here}
        found["model"] = world.all(found["model"])[world.rank - world.local]
    return found


def redistribute(parts, batch_size, seed, step, world):
    """This process's own part of a run saved by len(parts) processes, dealt out again if that number changed.

    Buffer: all pairs, oldest first, one to each process in turn. Ahead: likewise, batch by batch. Evaluation:
    by row. No pair is lost or doubled. Generators are new then, as seed and step say; else they go on bit for
    bit.
    """
    if len(parts) == world.size:
        return parts[world.rank]
    mine, places = slice(world.rank, None, world.size), range(sum(p["buffer"]["capacity"] for p in parts))
    place = (world.rank, step)
    pairs = [pair for part in parts for pair in unpack(part["buffer"]["pairs"])]
    buffer = {"capacity": len(places[mine]), "pairs": pack(sorted(pairs, key=lambda p: p.step)[mine]),
              "rng": np.random.default_rng(stream(seed, "draws", *place)).bit_generator.state}

    waiting, each = [unpack(part["ahead"]) for part in parts], batch_size // len(parts)
    ahead = []
    for i in range(0, len(waiting[0]), each):
        batch = [pair for pairs in waiting for pair in pairs[i:i + each]]
        ahead += batch[mine]

    held = [pair for part in parts for pair in unpack(part["eval_pairs"])]
    gaps = [gap for part in parts for gap in part["gaps"]]               # of all of them, or none yet
    order = sorted(range(len(held)), key=lambda i: held[i].row)[mine]
    return {"buffer": buffer, "ahead": pack(ahead), "eval_pairs": pack([held[i] for i in order]),
            "gaps": [gaps[i] for i in order if gaps],
            "cut_rng": np.random.default_rng(stream(seed, "cuts", *place)).bit_generator.state,
            "sample_rng": torch.Generator().manual_seed(stream(seed, "sampler", *place)).get_state()}
