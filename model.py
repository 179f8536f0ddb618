"""The decoder: Llama and its close relatives, written out by hand, with loading, saving and batched generation.

Holds the architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU), the KV cache, `sample` and
`generate`, LoRA, and Hugging Face folders of safetensors in and out. Leaves out tokenizers, training and processes.
Parameter names are the checkpoint's own, so loading needs no renaming table and is strict.

Axes: B rows, T tokens, D hidden size, H query heads, K key-value heads, E head size, V vocabulary, W cached keys;
      P trunk, S branch: a row may be [P trunk | S chosen | S rejected], see `Transformer.forward`.
"""

import copy
import json
import math
import os
import shutil
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

SHARD_BYTES = 5 * 10**9
LARGE = 2**17                                            # numbers of a matrix from which on `linear` takes its other product


class BadInput(ValueError):
    """Something handed to us cannot be used; the message is one sentence that says what to do."""


# ------------------------------------------------------------------------------------------------ configuration

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass
class ModelConfig:
    """The numbers of config.json that this decoder reads, under Hugging Face's names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope: dict = field(default_factory=lambda: {"rope_type": "default"})
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None      # a token sees itself and the window - 1 tokens before it
    source: dict = field(default_factory=dict, repr=False)   # config.json as it was read, for writing it back

    @classmethod
    def from_dict(cls, raw):
        """Read a config.json, completely or not at all: what the decoder does not implement raises BadInput."""
        if not isinstance(raw, dict):
            raise BadInput("config.json does not hold a JSON object; is this a Hugging Face model folder?")
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise BadInput(f"config.json: model_type {family!r} is not implemented; use one of {', '.join(sorted(FAMILIES))}")

        def number(key, kind=int, default=None, low=1, high=2**24):
            value = raw.get(key)
            value = default if value is None else value
            good = (int,) if kind is int else (int, float)
            if type(value) not in good or not low <= value <= high:
                raise BadInput(f"config.json: {key} is {value!r}; it must be {'a whole number' if kind is int else 'a number'} "
                               f"from {low} to {high}")
            return value

        def flag(key, default=False):
            value = raw.get(key)
            if value not in (None, True, False):
                raise BadInput(f"config.json: {key} is {value!r}; it must be true or false")
            return default if value is None else value

        hidden, heads = number("hidden_size"), number("num_attention_heads", high=2**14)
        bias = flag("attention_bias")
        config = cls(
            vocab_size=number("vocab_size"), hidden_size=hidden, intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers", high=10_000), num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", default=heads),
            head_dim=number("head_dim", default=max(1, hidden // heads), high=2**14),
            max_position_embeddings=number("max_position_embeddings", default=2048, high=2**31),
            rms_norm_eps=number("rms_norm_eps", float, 1e-6, low=0, high=1), **_rope(raw),
            tie_word_embeddings=flag("tie_word_embeddings"), qkv_bias=bias or family == "qwen2", o_bias=bias and family != "qwen2",
            mlp_bias=flag("mlp_bias"), qk_norm=family == "qwen3", source=raw)

        layers = raw.get("layer_types") or []
        if not isinstance(layers, list) or not all(isinstance(kind, str) for kind in layers):
            raise BadInput(f"config.json: layer_types is {str(layers)[:80]}; it must be a list of names")
        layers = set(layers)
        if raw.get("sliding_window") and (family == "mistral" or raw.get("use_sliding_window")):
            if family != "mistral" and layers != {"sliding_attention"}:
                raise BadInput("config.json: a sliding window on some layers only is not implemented; "
                               "set use_sliding_window to false for texts shorter than the window")
            config.sliding_window = number("sliding_window")
        refusals = {
            f"hidden_act {raw.get('hidden_act')!r} is not implemented, only silu": raw.get("hidden_act", "silu") != "silu",
            "partial_rotary_factor other than 1 is not implemented": (raw.get("partial_rotary_factor") or 1) != 1,
            "quantised weights cannot be trained; use the unquantised checkpoint": raw.get("quantization_config"),
            "mixture-of-experts models are not implemented": any(raw.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts")),
            f"layer_types {sorted(layers)} are not implemented": layers - {"full_attention", "sliding_attention"},
            f"{heads} query heads cannot share {config.num_key_value_heads} key-value heads evenly": heads % config.num_key_value_heads,
            f"head_dim {config.head_dim} is odd; rotary positions need an even one": config.head_dim % 2,
            f"hidden_size {hidden} is not a multiple of {heads} heads, and head_dim is not given": hidden % heads and not raw.get("head_dim"),
        }
        for sentence, broken in refusals.items():
            if broken:
                raise BadInput(f"config.json: {sentence}")
        return config

    def to_dict(self, dtype):
        """config.json for a saved model: the source's with only the dtype changed, or a plain Llama one."""
        raw = dict(self.source) or {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": self.qkv_bias,
            "rope_parameters": {"rope_theta": self.rope_theta, **self.rope}, "rope_theta": self.rope_theta,
            **{k: getattr(self, k) for k in ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
               "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings mlp_bias").split()}}
        raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(dtype).removeprefix("torch.")
        return raw


def _rope(raw):
    """rope_theta and the scaling, from both dialects: transformers 4 (rope_theta, rope_scaling), 5 (rope_parameters)."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise BadInput(f"config.json: rope_scaling is {scaling!r}; it must be an object or null")
    theta = next((t for t in (scaling.get("rope_theta"), raw.get("rope_theta")) if t is not None), 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise BadInput(f"config.json: rope type {kind!r} is not implemented; default, linear and llama3 are")
    if (scaling.get("partial_rotary_factor") or 1) != 1:
        raise BadInput("config.json: partial_rotary_factor other than 1 is not implemented")
    values = {"rope_theta": theta, **{k: scaling.get(k) for k in ROPE_KEYS[kind]}}
    if kind == "llama3" and values["original_max_position_embeddings"] is None:
        values["original_max_position_embeddings"] = raw.get("original_max_position_embeddings")
    for key, value in values.items():
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise BadInput(f"config.json: {key} of the {kind} rope is {value!r}; it must be a positive number")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise BadInput("config.json: high_freq_factor of the llama3 rope must be larger than low_freq_factor")
    return {"rope_theta": values.pop("rope_theta"), "rope": {"rope_type": kind, **values}}


def inverse_frequencies(config):
    """Rotary inverse frequencies theta^(-2i/E), scaled as the config asks: (E / 2,) float32.

    llama3 scaling: long waves are slowed by `factor`, short ones are left alone, and those between are blended.
    """
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv = 1.0 / config.rope_theta ** (i / config.head_dim)
    rope = config.rope
    if rope["rope_type"] == "default":
        return inv
    slowed = inv / rope["factor"]
    if rope["rope_type"] == "linear":
        return slowed
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)    # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)                         # 0: slow it down, 1: leave it
    return (1 - keep) * slowed + keep * inv


# ------------------------------------------------------------------------------------------------ the decoder

class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or wider and cast back before the weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def linear(x, weight, bias=None):
    """F.linear, x (..., columns) -> (..., rows), with another product where a CPU decodes: few tokens, a large matrix.

    The usual one packs the whole matrix anew in each call, and leaves cores idle. A batched product of 16 of its rows at
    a time makes the same sums, rounding aside; on two cores in half the time (tests/bench.py generate).
    """
    few = x.numel() // x.shape[-1] <= 32 and weight.numel() >= LARGE and weight.shape[0] % 16 == 0
    if not few or not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    parts = x.reshape(-1, x.shape[-1]) @ weight.unflatten(0, (-1, 16)).mT              # (rows / 16, N, 16)
    out = parts.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def rotate(x, cos, sin):
    """Rotary positions on x (B, heads, T, E): the first half of a head pairs with its second half.

    cos, sin (B, 1, T, E) are those of (-angles, angles), so that what is added to the first half is subtracted.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v, mask):
    """Softmax attention: q (B, H, T, E); k, v (B, K, W, E); mask "causal" or bool, True where visible -> (B, H, T, E)."""
    causal = isinstance(mask, str)
    if q.shape[2] == 1 and not causal:                   # one query a row: the heads of a group are rows of one matrix
        B, H, _, E = q.shape
        return F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, E), k, v, attn_mask=mask).view(B, H, 1, E)
    if k.shape[1] != q.shape[1]:                         # expanded, because masked CUDA backends take no groups
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal)


def attend_branches(q, k, v, trunk, trunk_mask, branch_mask):
    """Attention of rows [P trunk | S chosen | S rejected]: each branch sees the trunk and itself, never the other."""
    B, _, T, E = q.shape
    P, S = trunk, (T - trunk) // 2

    def fold(t):         # (B, heads, 2S, E) -> (2B, heads, S, E): the branches become rows
        return t[:, :, P:].unflatten(2, (2, S)).transpose(1, 2).flatten(0, 1)

    def behind(t):       # (2B, heads, P + S, E): the trunk, once for each branch, then the branch itself
        return torch.cat((t[:, :, :P].repeat_interleave(2, 0), fold(t)), 2)

    on_trunk = attend(q[:, :, :P], k[:, :, :P], v[:, :, :P], trunk_mask)
    on_branches = attend(fold(q), behind(k), behind(v), branch_mask)                   # (2B, H, S, E)
    return torch.cat((on_trunk, on_branches.unflatten(0, (B, 2)).transpose(1, 2).flatten(2, 3)), 2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        norm = (lambda: RMSNorm(c.head_dim, c.rms_norm_eps)) if c.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, rope, masks, trunk, cache):
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim))                         # (B, T, heads, E)
        q = rotate(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), *rope)          # (B, H, T, E)
        k = rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), *rope)          # (B, K, T, E)
        v = heads(self.v_proj(x)).transpose(1, 2)                                      # (B, K, T, E)
        if cache is not None:
            k, v = cache.put(k, v)                                                     # (B, K, W, E)
        out = attend_branches(q, k, v, trunk, *masks) if trunk else attend(q, k, v, masks[0])
        return self.o_proj(out.transpose(1, 2).flatten(2))                             # (B, T, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))             # SwiGLU


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, masks, trunk=0, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, masks, trunk, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """A causal language model. `gradient_checkpointing` recomputes each block in the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.inv_freq = inverse_frequencies(config)      # float32 whatever the weights are cast to, hence no buffer

    def init_weights(self, generator):
        """Draw each matrix (rows, columns) from N(0, 1 / columns), what writes to the residual stream smaller by sqrt(2 layers).

        At this size the usual 0.02 leaves attention flat for hundreds of steps, and nothing is copied from the prompt.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, 0.0, (p.shape[1] * (2 * self.config.num_hidden_layers if residual else 1)) ** -0.5, generator)
        return self

    def forward(self, ids, positions=None, trunk=0, cache=None, head=None):
        """Logits (B, T, V) of ids (B, T) int64, or head(hidden, lm_head.weight) where `head` is given.

        positions (B, T): each token's place in its own text; 0, 1, 2 ... where not given. Rows are padded on the right,
        and padding needs no mask: nothing before it can see it.
        trunk = P > 0: a row is [P trunk | S chosen | S rejected], two texts with a common beginning. Each branch sees
        the trunk and itself. positions[:, P], where a branch starts, is the trunk's true length.
        cache: a KVCache to read and extend.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.model.embed_tokens(ids)                                               # (B, T, D)
        self.inv_freq = self.inv_freq.to(ids.device)
        angles = positions[:, None, :, None] * self.inv_freq                           # (B, 1, T, E / 2), float32
        angles = torch.cat((-angles, angles), -1)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)                      # (B, 1, T, E)
        masks = self._masks(positions, trunk, cache)
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, masks, trunk, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, masks, trunk, None if cache is None else cache.layer(i, positions))
        x = self.model.norm(x)
        return head(x, self.lm_head.weight) if head else self.lm_head(x)

    def _masks(self, positions, trunk, cache):
        """(mask of the trunk or of the whole row, mask of the branches): "causal" where no tensor is needed."""
        window, T = self.config.sliding_window, positions.shape[1]

        def visible(query, key):    # places in the text; key k is visible to query q iff q - window < k <= q
            seen = key[..., None, :] <= query[..., :, None]
            return seen & (key[..., None, :] > query[..., :, None] - window) if window else seen

        if cache is not None and T == 1:
            slots = torch.arange(cache.width, device=positions.device)
            return visible(positions, slots)[:, None], None                            # (B, 1, 1, W)
        P = trunk or T
        row = torch.arange(P, device=positions.device)
        first = visible(row, row) if window and P > window else "causal"               # (P, P)
        if not trunk:
            return first, None
        branches = positions[:, P:].unflatten(1, (2, -1)).flatten(0, 1)                # (2B, S)
        length = branches[:, :1]                                                       # the trunk's true length
        on_trunk = visible(branches, row.expand(len(branches), P)) & (row < length)[:, None]
        return first, torch.cat((on_trunk, visible(branches, branches)), -1)[:, None]  # (2B, 1, S, P + S)


def twin(model):
    """A copy that does not train: for the EMA, the reference and the writer. Frozen parameters are shared, not copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ LoRA

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank: W x + (alpha / rank) B A x (Hu et al., arXiv 2106.09685).

    A is drawn once and frozen, B starts at 0 and is trained (LoRA-FA, arXiv 2308.03303). That is for the EMA's sake: the
    average of two A's times the average of two B's is not the average of the products; with one common A it is. So [9]
    of Algorithm 1 moves the weights themselves, and policy, EMA and reference differ in B alone.
    """

    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        rows, columns = linear.weight.shape
        A = torch.randn(rank, columns, generator=generator) / columns ** 0.5
        self.lora_A = nn.Parameter(A.to(linear.weight.device), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=linear.weight.device))

    def forward(self, x):
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return linear(x, self.weight, self.bias) + self.scale * change

    def merged(self):
        """W + (alpha / rank) B A, in float32 or wider: (rows, columns)."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model, rank, alpha, generator, projections=PROJECTIONS):
    """Freeze a Transformer and put an adapter on each of the named projections. Names stay; B = 0 changes no bit."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in [n for n, _ in part.named_children() if n in projections]:
                setattr(part, name, LoRA(getattr(part, name), rank, alpha, generator))
    return model


def plain_weights(model):
    """(name, tensor) of each weight as a plain decoder has it: adapters merged, shards gathered (by all processes together)."""
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not leaf.startswith("lora_"):
            module = model.get_submodule(owner)
            value = (module.merged() if leaf == "weight" and isinstance(module, LoRA) else p).detach()
            yield name, value.full_tensor() if hasattr(value, "full_tensor") else value


# ------------------------------------------------------------------------------------------------ generation

class KVCache:
    """Keys and values of all layers in one piece, sized once: (layers, B, K, W, E). Slot w holds the text's token w."""

    def __init__(self, config, batch, width, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, width, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.width, self.at = width, None

    def layer(self, i, positions):
        """This cache, set to write layer i at `positions` (B, T)."""
        self.k, self.v, self.at = self.keys[i], self.values[i], positions
        return self

    def put(self, k, v):
        """Store (B, K, T, E); return everything up to `width`, or only what was given if it is a whole beginning."""
        T = k.shape[2]
        if T > 1:                                        # prefill: the first T slots, padding included
            self.k[:, :, :T], self.v[:, :, :T] = k, v
            return k, v
        slot = self.at[:, None, :, None].expand_as(k)
        self.k.scatter_(2, slot, k), self.v.scatter_(2, slot, v)
        return self.k[:, :, :self.width], self.v[:, :, :self.width]


def sample(logits, uniform, temperature, top_k, top_p):
    """One token a row from logits (B, V) with uniform (B,) in [0, 1): temperature, then top-k, then top-p (nucleus).

    temperature 0 is greedy, top_k 0 and top_p 1 keep everything. The draw inverts the cumulative distribution of the
    kept tokens, most probable first, so equal uniforms give equal tokens whatever stands in the other rows.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = _filtered(logits, temperature, top_k, top_p)
    cumulative = probs.cumsum(-1)
    pick = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    return order.gather(-1, pick)[:, 0]


def _filtered(logits, temperature, top_k, top_p):
    """(probs, tokens), both (B, k), most probable first; what top-p removes has probability 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    top, order = logits.topk(k, -1) if k < logits.shape[-1] else logits.sort(dim=-1, descending=True, stable=True)
    probs = top.softmax(-1)
    if top_p < 1:                                        # a token stays while those before it hold less than top_p
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    return probs, order


@torch.inference_mode()
def generate(model, prompts, budgets, eos=(), temperature=1.0, top_k=0, top_p=1.0, generator=None, vocab=None, ban=(),
             timed=lambda stage: nullcontext()):
    """Continue each prompt (a list of ids) by at most its budget, up to and including a token of `eos`.

    generator: a CPU torch.Generator that owns the draws (not needed when temperature is 0). vocab: ids from here on are
    never sampled (a padded embedding has more rows than the tokenizer has tokens). ban: further ids never sampled.
    timed: a context manager around the stages "prefill" and "decode".
    Returns a list of lists. All uniforms are drawn first, row after row, so a row's text does not depend on its batch,
    rounding aside: many rows at once give what one row at a time gives.
    """
    if not all(map(len, prompts)):
        raise ValueError("generate needs at least one token in each prompt (the BOS token of an empty text)")
    if max(budgets, default=0) < 1:
        return [[] for _ in prompts]
    embedding, longest, steps = model.model.embed_tokens.weight, max(map(len, prompts)), max(budgets)
    device = embedding.device
    draws = torch.rand if temperature else torch.zeros
    draws = draws(sum(budgets), dtype=torch.float64, **({"generator": generator} if temperature else {}))
    pad = lambda rows: nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    uniform, ids = pad(draws.split(list(budgets))), pad(map(torch.tensor, prompts))     # (B, steps), (B, T)
    lengths, budgets = torch.tensor([list(map(len, prompts)), list(budgets)], device=device)
    width = longest + steps if device.type == "cpu" else -(-(longest + steps) // 64) * 64
    cache = KVCache(model.config, len(prompts), width, embedding.dtype, device)
    stops = torch.tensor(sorted(eos), dtype=torch.long, device=device)
    banned = torch.tensor([i for i in ban if i < (vocab or embedding.shape[0])], dtype=torch.long, device=device)
    out = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
    turn = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)                # how many times all rows were asked
    made, done = torch.zeros_like(lengths), budgets <= 0                                # tokens written so far, a row

    # What follows changes tensors in place, so that a CUDA graph can replay it.
    def choose():
        seen = logits[:, :vocab].index_fill(1, banned, -torch.inf) if len(banned) else logits[:, :vocab]
        token = sample(seen, uniform.gather(1, turn)[:, 0], temperature, top_k, top_p)
        out.scatter_(1, turn, token[:, None])
        made.add_(~done)
        done.logical_or_((made >= budgets) | (token[:, None] == stops).any(-1))

    def read():          # a finished row goes on reading into the slot behind its last token, and nobody looks
        token = out.gather(1, turn)
        logits.copy_(model(token, positions=(lengths + made - 1)[:, None], cache=cache)[:, 0])
        turn.add_(1)

    def both():
        read()
        choose()

    last = lambda hidden, weight: linear(hidden[torch.arange(len(prompts), device=device), lengths - 1], weight)
    with timed("prefill"):
        logits = model(ids, cache=cache, head=last)                                     # (B, V): the head where a row ends
        choose()
    with timed("decode"):
        for step in range(1, steps):
            # asking whether all are done makes a GPU wait, so it is asked now and then
            if (device.type == "cpu" or step % 16 == 0) and bool(done.all()):
                break
            if device.type == "cpu":
                cache.width = longest + step             # what is still empty need not be read
            both()
            if device.type == "cuda" and step == 1 and steps > 8:
                both = _graph(both)
    return [row[:n] for row, n in zip(out.tolist(), made.tolist())]


def _graph(function):
    """A function of no arguments that works in place, as one CUDA graph: hundreds of kernels, one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


# ------------------------------------------------------------------------------------------------ folders in and out

def read_config(folder):
    """config.json of a model folder as (ModelConfig)."""
    return ModelConfig.from_dict(read_json(Path(folder) / "config.json", "model folder"))


def read_json(path, what="file"):
    """A JSON file, or BadInput with one sentence."""
    try:
        text = Path(path).read_text("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():                       # half a surrogate pair is JSON, but it is not text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; a {what} needs it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None


def weight_files(folder):
    """{tensor name: (file, shape, dtype)} from the safetensors headers of a model folder; reads no weights."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        where = {single: None}
    elif index.exists():
        table = read_json(index)
        table = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(table, dict) or not table:
            raise BadInput(f"{index}: no weight_map in it")
        where = {}
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise BadInput(f"{index}: {name} points to {file!r}, which is not a file name in this folder")
            where.setdefault(folder / file, set()).add(name)
    else:
        raise BadInput(f"{folder}: no model.safetensors; convert pickled weights to safetensors first")
    found = {}
    for path, expected in where.items():
        try:
            with safe_open(path, "pt") as f:
                names = set(f.keys())
                for name in names:
                    part = f.get_slice(name)
                    found[name] = (path, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: not a sound safetensors file ({error})") from None
        if expected is not None and expected - names:
            raise BadInput(f"{path}: {sorted(expected - names)[0]} is missing, though the index says it is here")
    return {name: value for name, value in found.items() if not name.endswith("rotary_emb.inv_freq")}


def check_weights(folder, config):
    """Compare names and shapes in the files with what the config asks for; BadInput if they differ. Returns weight_files."""
    files = weight_files(folder)
    layers = {int(n.split(".")[2]) for n in files if n.startswith("model.layers.") and n.split(".")[2].isdigit()}
    if len(layers) != config.num_hidden_layers:          # before building anything of that size
        raise BadInput(f"{folder}: config.json says {config.num_hidden_layers} layers, the weights hold {len(layers)}")
    if config.source.get("model_type") in ("llama", "mistral"):     # the Qwen families' biases and norms are not optional
        has = lambda part: any(n.endswith(part) for n in files)
        stated = config.source.get("attention_bias")
        if stated is not None and stated != has("q_proj.bias"):
            raise BadInput(f"{folder}: config.json says attention_bias {stated}, the weights say {has('q_proj.bias')}")
        config.qkv_bias, config.o_bias = has("q_proj.bias"), has("o_proj.bias")
        if stated is None and config.qkv_bias and config.o_bias:     # transformers, and a run that is resumed, have only the config to go by
            config.source = config.source | {"attention_bias": True}
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in Transformer(config).named_parameters()}
    extra = set(files) - set(wanted) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for names, what in ((set(wanted) - set(files), "missing from the weights"), (extra, "in the weights but not in the model")):
        if names:
            raise BadInput(f"{folder}: {sorted(names)[0]} and {len(names) - 1} others are {what}" if len(names) > 1
                           else f"{folder}: {names.pop()} is {what}")
    for name, shape in wanted.items():
        if files[name][1] != shape:
            raise BadInput(f"{folder}: {name} has shape {files[name][1]}, the config asks for {shape}")
        if files[name][2] not in ("F32", "BF16", "F16", "F64"):
            raise BadInput(f"{folder}: {name} is stored as {files[name][2]}; float32, bfloat16 or float16 is needed")
    if extra := set(files) - set(wanted):                # a tied head that is stored as well
        head, embedding = (safe_open(files[n][0], "pt").get_tensor(n) for n in (*extra, "model.embed_tokens.weight"))
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise BadInput(f"{folder}: config.json ties lm_head to the embedding, but the file holds a different lm_head; set tie_word_embeddings to false")
    return files


def load_pretrained(folder, dtype=torch.float32, device="cpu"):
    """A Transformer from a Hugging Face folder (config.json, safetensors), strictly: BadInput before any weight is read.

    Tensor by tensor, so that memory holds one copy of the model and one tensor more.
    """
    config = read_config(folder)
    return blank(config, dtype, device, read_weights(folder, check_weights(folder, config)))


def read_weights(folder, files=None):
    """(name, tensor as stored) of each weight in a folder, one at a time."""
    files = files or check_weights(folder, read_config(folder))
    for path in sorted({path for path, *_ in files.values()}):
        with safe_open(path, "pt") as f:
            for name in [n for n in f.keys() if n in files]:
                yield name, f.get_tensor(name)


@torch.no_grad()
def blank(config, dtype=torch.float32, device="cpu", weights=None):
    """A Transformer whose weights are `weights`, (name, tensor) pairs, or are yet to be filled."""
    with torch.device("meta"):
        model = Transformer(config)
    values = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
    for name, tensor in weights or ():
        if name in values:                               # all but a tied head, which equals the embedding
            values[name].copy_(tensor)
    if config.tie_word_embeddings:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    model.load_state_dict(values, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(True)


def saved_dtype(folder):
    """The dtype most weights of a folder are stored in."""
    kinds = [dtype for _, _, dtype in weight_files(folder).values()]
    return {"F32": torch.float32, "F16": torch.float16, "F64": torch.float32}.get(max(kinds, key=kinds.count), torch.bfloat16)


def companions(folder):
    """{name: bytes} of what stands beside the weights of a model folder: tokenizer, templates, licence. No config.json."""
    keep = lambda p: p.is_file() and p.name != "config.json" and not p.name.startswith(".") and not p.name.endswith(".index.json") \
        and p.suffix in ("", ".json", ".jinja", ".txt", ".model", ".md") and p.stat().st_size < 2**28
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if keep(p)}


def save_pretrained(model, folder, dtype=torch.bfloat16, files=None, weights=None):
    """Write a Hugging Face folder: weights as `dtype` in shards under 5 GB, config.json, and `files`, {name: bytes}, as
    `companions` read them. Written beside, then renamed, so the folder is whole or not there.

    weights: {name: tensor} of plain_weights(model), where they were gathered already.
    """
    weights = dict(weights or plain_weights(model))
    shards, size = [[]], 0
    for name, tensor in weights.items():
        size += tensor.numel() * dtype.itemsize
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = tensor.numel() * dtype.itemsize
        shards[-1].append(name)
    weight_map = {}
    with new_folder(folder) as temporary:
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            part = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
            save_file(part, temporary / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(w.numel() for w in weights.values()) * dtype.itemsize
            write_json(temporary / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(temporary / "config.json", model.config.to_dict(dtype))
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)


def save_adapter(model, folder, base):
    """Write the LoRA factors as a folder that `peft` loads onto `base`, a folder or hub name."""
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    factors = {f"base_model.model.{name}.{leaf}.weight": getattr(m, leaf).detach().float().cpu().contiguous()
               for name, m in adapters.items() for leaf in ("lora_A", "lora_B")}
    rank, scale = next((m.lora_A.shape[0], m.scale) for m in adapters.values())
    with new_folder(folder) as temporary:
        save_file(factors, temporary / "adapter_model.safetensors", {"format": "pt"})
        write_json(temporary / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": scale * rank,
            "target_modules": sorted({name.rpartition(".")[2] for name in adapters}), "lora_dropout": 0.0, "bias": "none", "inference_mode": True})


@contextmanager
def new_folder(folder):
    """A temporary folder to write into, which gets the name `folder` at the end, once the disk holds it: whole or not there.

    What had that name is moved aside just before, and deleted after. What fails on the way is deleted: a full disk needs the room.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush(path):
    """Have the disk hold what was written (a folder too, where the system allows it)."""
    with suppress(PermissionError, IsADirectoryError):
        handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)      # Windows flushes only what it may write
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path, value):
    """Pretty JSON, through a temporary name."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)
