"""Hugging Face folders in and out, and the hub.

Checks names and shapes before a weight is read, and reads weights tensor by tensor. No pickle, no code from a
checkpoint. Leaves out config.json (config.py) and tokenizers (text.py).
"""

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from machine.config import config_to_dict, read_config
from machine.files import BadInput, new_folder, read_json, write_json
from model import LoRA, Transformer, unshard


# ----------------------------------------------------------------------------- weights in
def weight_files(folder):
    """{tensor name: (file, shape, dtype)} from the safetensors headers of a model folder."""
    folder, found = Path(folder), {}
    for path in _shards(folder):
        try:
            with safe_open(path, "pt") as f:
                for name in f.keys():
                    part = f.get_slice(name)
                    found[name] = (path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: not a sound safetensors file ({error})") from None
    return {name: value for name, value in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _shards(folder):
    """The files that hold a model folder's weights."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():                                 # a pipe would be waited for
        return [single]
    if not index.exists():
        raise BadInput(f"{folder}: no model.safetensors; convert pickled weights to safetensors first")
    table = read_json(index)
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{index}: no weight_map in it")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise BadInput(f"{index}: {name} points to {file!r}, which is not a file in this folder")
    return sorted({folder / file for file in table.values()})


def check_weights(folder, config):
    """Compare names and shapes in the files with what the config asks for; BadInput if they differ. Returns
    weight_files."""
    files = weight_files(folder)
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in Transformer(config).named_parameters()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for names, what in ((wanted.keys() - files.keys(), "missing from the weights"),
                        (files.keys() - wanted.keys() - tied, "in the weights but not in the model")):
        if names:
            others = f" and {len(names) - 1} others are" if len(names) > 1 else " is"
            raise BadInput(f"{folder}: {min(names)}{others} {what}")
    for name, shape in wanted.items():
        if files[name][1] != shape:
            raise BadInput(f"{folder}: {name} has shape {files[name][1]}, the config asks for {shape}")
        if files[name][2] not in ("F32", "BF16", "F16", "F64"):
            raise BadInput(f"{folder}: {name} is stored as {files[name][2]}; float64, float32, bfloat16 or "
                           "float16 is needed")
    if files.keys() - wanted.keys():                     # a tied head that is stored as well
        names = ("lm_head.weight", "model.embed_tokens.weight")
        head, embedding = [safe_open(files[name][0], "pt").get_tensor(name) for name in names]
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise BadInput(f"{folder}: config.json ties lm_head to the embedding, but the file holds a "
                           "different lm_head; set tie_word_embeddings to false")
    return files


def load_pretrained(folder, dtype=torch.float32, device="cpu"):
    """A Transformer from a Hugging Face folder, strictly: BadInput comes before any weight is read.

    Tensor by tensor, so that memory holds one copy of the model and one tensor more.
    """
    config = read_config(folder)
    weights = read_weights(folder, check_weights(folder, config))
    return load_weights(blank(config, dtype, device), weights)


def read_weights(folder, files=None):
    """(name, tensor as stored) of each weight in a folder, one at a time."""
    files = files or check_weights(folder, read_config(folder))
    for path in sorted({path for path, *_ in files.values()}):
        with safe_open(path, "pt") as f:
            for name in f.keys():
                if name in files:
                    yield name, f.get_tensor(name)


def blank(config, dtype=torch.float32, device="cpu"):
    """A Transformer whose weights are yet to be filled."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:                       # which `to_empty` has parted
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@torch.no_grad()
def load_weights(model, weights):
    """Copy (name, whole tensor) pairs into a model that may be sharded, one at a time. Returns the model."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        if name in parameters:                           # all but a tied head, which equals the embedding
            parameters[name].copy_(shard_like(tensor, parameters[name]))
    return model


def shard_like(tensor, parameter):
    """A whole tensor, placed and sharded as `parameter` is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "placements") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


# ---------------------------------------------------------------------------- folders out
SHARD_BYTES = 5 * 10**9


def companions(folder):
    """{name: bytes} of what stands beside config.json and weights: tokenizer, templates, licence."""
    paths = [path for path in sorted(Path(folder).iterdir()) if any(map(path.match, BESIDE[1:]))]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def plain_weights(model):
    """(name, tensor) of each weight as a plain decoder has it: adapters merged, shards gathered."""
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not leaf.startswith("lora_"):
            module = model.get_submodule(owner)
            merge = leaf == "weight" and isinstance(module, LoRA)
            yield name, unshard((module.merged() if merge else p).detach())


def save_pretrained(model, folder, dtype=torch.bfloat16, files=None, weights=None):
    """Write a Hugging Face folder: weights as `dtype` in shards under 5 GB, config.json, and `files`, {name:
    bytes}, as `companions` read them. It is whole or not there.

    weights: {name: tensor} of plain_weights(model), where they were gathered already.
    """
    weights = dict(weights or plain_weights(model))
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
    with new_folder(folder) as temporary:
        save_torch_state_dict(weights, temporary, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
        write_json(temporary / "config.json", config_to_dict(model.config, dtype))
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)


def save_adapter(model, folder, base, commit=None):
    """Write the LoRA factors as a folder that `peft` loads onto `base`, a folder or a hub name (`commit`)."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}
    factors = {}
    for name, module in adapters.items():
        rank, scale = len(module.lora_A), module.scale
        for leaf in ("lora_A", "lora_B"):
            factor = getattr(module, leaf).detach().float().cpu().contiguous()
            factors[f"base_model.model.{name}.{leaf}.weight"] = factor
    with new_folder(folder) as temporary:
        save_file(factors, temporary / "adapter_model.safetensors", {"format": "pt"})
        write_json(temporary / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
            "revision": commit, "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
            "inference_mode": True})


# -------------------------------------------------------------------------------- the hub
BESIDE = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja",
          "added_tokens.json", "vocab.json", "merges.txt", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]       # no other: Mistral's come twice


def find_model(name, world, patterns=BESIDE):
    """(folder, commit or None) of --model: a local folder, else what of a hub name matches the patterns,
    fetched by one process a node while the others wait."""
    def find():
        if Path(name).is_dir():
            return Path(name), None
        folder = fetch(name, patterns)
        return folder, folder.name

    world.together(lambda: find() if world.local == 0 else None)
    return world.together(find)


def fetch(name, patterns, **how):
    """The local folder of a hub name[@revision], fetched if need be; BadInput says why it cannot be."""
    from huggingface_hub import constants, errors, snapshot_download
    repo, _, revision = name.partition("@")
    where = f"--model {name}: no such folder, "
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns, **how))
        if constants.HF_HUB_OFFLINE and WEIGHTS[0] in patterns and not any(folder.glob(WEIGHTS[0])):
            raise FileNotFoundError(WEIGHTS[0])          # only the files beside them are in the cache
        return folder
    except errors.HFValidationError:
        raise BadInput(f"{where}and not a hub name either") from None
    except errors.GatedRepoError:
        raise BadInput(f"--model {name}: the repository is gated; accept its terms on the hub, then run: "
                       "hf auth login") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise BadInput(f"{where}and the hub knows no such repository or revision") from None
    except Exception as error:                           # offline, timed out, proxy: many kinds
        offline = ", as HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise BadInput(f"{where}and the hub cannot be reached{offline} ({type(error).__name__}); "
                       "download the repository elsewhere and give its folder") from None


def stored_weights(name):
    """weight_files of --model as far as they lie on this disk; {} where they do not."""
    try:
        return weight_files(name if Path(name).is_dir() else fetch(name, WEIGHTS, local_files_only=True))
    except BadInput:
        return {}
