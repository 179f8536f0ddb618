"""The decoder: Llama and its relatives, written out by hand, with batched generation.

Holds the architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU), the KV cache,
`sample` and `generate`, LoRA, and `twin`. Leaves out files, tokenizers, training and processes:
machine/folders.py reads checkpoints, whose parameter names are the ones used here.

Axes: B rows, T tokens of a row, N tokens of a stream, D hidden size, H query heads, K key-value
      heads, E head size, V vocabulary, W cached keys. What is `...` below is (N,) of a stream, or
      (B, T) of rows; see `Transformer.forward`.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

LARGE = 2**17        # matrices this large get the other product of `linear`
torch.backends.cuda.enable_cudnn_sdp(False)    # it makes a plan for each shape, and ours all differ


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
    gemma_norms: bool = False              # four norms a block, whose weights count from 1
    hidden_act: str = "silu"               # or gelu_pytorch_tanh
    embedding_scale: float = 1.0
    attention_scale: float | None = None   # what scores are multiplied by; None: head_dim ** -0.5
    sliding_window: int | None = None      # a token sees itself and the window - 1 tokens before it
    layer_types: list = field(default_factory=list)      # the kind of each layer, where they differ
    kinds: dict = field(default_factory=lambda: {"all": {}})     # what a kind changes of the above
    source: dict = field(default_factory=dict, repr=False)   # config.json as it was read


# ------------------------------------------------------------------- the layers
class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or wider and cast back before the weight. Gemma's
    is x / rms(x) * (1 + weight), cast back after it."""

    def __init__(self, c, size):
        super().__init__()
        self.eps, self.gemma = c.rms_norm_eps, c.gemma_norms
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.gemma))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (wide * (1 + self.weight.to(wide.dtype))).to(x.dtype)
        return self.weight * wide.to(x.dtype)


def linear(x, weight, bias=None):
    """F.linear, x (..., columns) -> (..., rows), but where a CPU decodes (few tokens, a large
    matrix), a batched product of 16 rows at a time. The usual product repacks the whole matrix in
    each call; this one takes half the time on two cores (tools/bench.py generate).
    """
    few = x.numel() // x.shape[-1] <= 32 and weight.numel() >= LARGE and weight.shape[0] % 16 == 0
    if not few or not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    parts = x.reshape(-1, x.shape[-1]) @ weight.unflatten(0, (-1, 16)).mT  # (rows / 16, N, 16)
    out = parts.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def rotary_frequencies(config):
    """Rotary inverse frequencies theta^(-2i/E), scaled as the config asks: (E / 2,) float32.

    Long waves are slowed by `factor`, short ones kept, others blended. Which is which depends, for
    llama3, on a wave's turns in the original context, for yarn (arXiv 2309.00071) on its index i.
    """
    rope, E = config.rope, config.head_dim
    i = torch.arange(E // 2, dtype=torch.float32, device="cpu")
    inv = 1.0 / config.rope_theta ** (2 * i / E)
    keep = 0.0                                                             # 0: slow it, 1: leave it
    length = rope.get("original_max_position_embeddings", 0) / (2 * math.pi)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((length * inv - low) / (high - low)).clamp(0, 1)
    if rope["rope_type"] == "yarn":
        first, last = (E / 2 * math.log(length / rope[turns], config.rope_theta)
                       for turns in ("beta_fast", "beta_slow"))
        if rope["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, E - 1)
        keep = 1 - ((i - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - keep) * inv / rope.get("factor", 1.0) + keep * inv


def rotate(x, cos, sin):
    """Rotary positions on x (..., heads, E): the first half of a head pairs with its second half.

    cos, sin (..., 1, E) are those of (-angles, angles), hence the minus of the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v, mask, scale):
    """Softmax attention: q (B, H, T, E); k, v (B, K, W, E) -> (B, H, T, E).

    mask: bool, True where a key is visible; None is a causal one.
    """
    if q.shape[2] == 1 and mask is not None:       # one query: a group's heads are rows of a matrix
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])            # (B, K, H / K, E)
        return F.scaled_dot_product_attention(grouped, k, v, mask, scale=scale).reshape(q.shape)
    if k.shape[1] != q.shape[1]:           # expanded, because masked CUDA backends take no groups
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.scale = c.head_dim, c.attention_scale
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = Linear(queries, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c, c.head_dim) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c, c.head_dim) if c.qk_norm else nn.Identity()

    def heads(self, t):
        return t.unflatten(-1, (-1, self.head_dim))                        # (..., heads, E)

    def forward(self, x, rope, mask, stream, store):
        rows, places = stream or (None, None)

        def by_row(t):               # (N, heads, E) or (B, T, heads, E) -> (B, heads, T, E)
            return (t if rows is None else t[rows]).transpose(1, 2)

        q = rotate(self.q_norm(self.heads(self.q_proj(x))), *rope)         # (..., H, E)
        k = rotate(self.k_norm(self.heads(self.k_proj(x))), *rope)         # (..., K, E)
        k, v = by_row(k), by_row(self.heads(self.v_proj(x)))               # (B, K, T, E)
        if store:
            k, v = store(k, v)                                             # (B, K, W, E)
        out = attend(by_row(q), k, v, mask, self.scale).transpose(1, 2)    # (B, T, H, E)
        if stream:
            out = out.flatten(0, 1)[places]                                # (N, H, E)
        return self.o_proj(out.flatten(-2))                                # (..., D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act = F.silu if c.hidden_act == "silu" else partial(F.gelu, approximate="tanh")
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))   # SwiGLU, GeGLU


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c, c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c, c.hidden_size)
        self.mlp, self.gemma = MLP(c), c.gemma_norms
        if self.gemma:
            self.pre_feedforward_layernorm = RMSNorm(c, c.hidden_size)
            self.post_feedforward_layernorm = RMSNorm(c, c.hidden_size)

    def forward(self, x, rope, mask, stream=None, store=None):
        out = self.self_attn(self.input_layernorm(x), rope, mask, stream, store)
        if not self.gemma:
            x = x + out
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(out)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


# ------------------------------------------------------------------ the decoder
class View:
    """What the layers of one kind see of a text: rotary positions, and keys within a window."""

    def __init__(self, c):
        self.window, self.gain = c.sliding_window, c.rope.get("attention_factor", 1.0)
        self.inv_freq = rotary_frequencies(c)            # float32 always, hence no buffer

    def rope(self, positions, dtype):
        """(cos, sin) for `rotate`, both (..., 1, E)."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None, None] * self.inv_freq                # (..., 1, E / 2)
        angles = torch.cat((-angles, angles), -1)                          # float32
        return (self.gain * angles.cos()).to(dtype), (self.gain * angles.sin()).to(dtype)

    def visible(self, query, key):
        """Whether key k may be seen by query q, (..., q, k): q - window < k <= q, both places."""
        query, key = query[..., :, None], key[..., None, :]
        return (key <= query) & (key > query - self.window) if self.window else key <= query

    def mask(self, positions, width, decoding):
        """Which of `width` keys are seen, bool; None: plain causal. In decoding: for one query a
        row, at its position (B, 1); else for each place."""
        keys = torch.arange(width, device=positions.device)
        if decoding:
            return self.visible(positions, keys)[:, None]                  # (B, 1, 1, W)
        return self.visible(keys, keys) if self.window and width > self.window else None   # (T, T)


class Transformer(nn.Module):
    """A causal language model. `gradient_checkpointing` recomputes each block going backward."""

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config, config.hidden_size)})
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.views = {kind: View(replace(config, **own)) for kind, own in config.kinds.items()}

    def init_weights(self, rng):
        """Draw each matrix (rows, columns) from N(0, 1 / columns), what writes to the residual
        stream smaller by sqrt(2 layers). rng: a torch.Generator.

        At a small size the usual 0.02 leaves attention flat for hundreds of steps.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                shrink = 2 * self.config.num_hidden_layers if residual else 1
                nn.init.normal_(p, 0.0, (p.shape[1] * shrink) ** -0.5, rng)
        return self

    def forward(self, ids, rows=None, positions=None, cache=None, head=None):
        """Logits (..., V) of ids (...) int64, or head(hidden, lm_head.weight) where one is given.

        rows (B, T): ids (N,) is a stream of texts, without padding. Token t of text b is
        ids[rows[b, t]], and -1 stands past the text's end. Texts with a common beginning may share
        its tokens, which are then computed once. Only attention goes by rows.
        Without rows, ids (B, T) are texts of one length, or padded on the right.
        cache: a KVCache for these rows to fill, or to extend by ids (B, 1) at positions (B, 1).
        """
        stream, decoding = None, False
        if rows is not None:                             # a stream
            places, width = first_places(rows, len(ids)), rows.shape[1]
            positions = places % width                                     # (N,)
            # padding is the text's own tokens, lest a NaN of another's reach it: 0 * NaN is NaN;
            # all in turn, because a GPU adds the gradients of equal places one after another
            own = torch.arange(width, device=ids.device) % (rows >= 0).sum(1, keepdim=True)
            stream = rows.gather(1, own), places
        elif cache is None:                              # whole rows
            width = ids.shape[1]
            positions = torch.arange(width, device=ids.device).expand_as(ids)
        else:                                            # a token more of each row
            width, decoding = cache.width, True
        x = self.model.embed_tokens(ids)                                   # (..., D)
        if self.config.embedding_scale != 1:             # rounded as the embedding is
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        seen = {kind: (view.rope(positions, x.dtype), view.mask(positions, width, decoding))
                for kind, view in self.views.items()}
        kinds = self.config.layer_types or [*self.views] * len(self.model.layers)
        for i, (kind, block) in enumerate(zip(kinds, self.model.layers)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *seen[kind], stream, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, *seen[kind], stream, cache and partial(cache.put, i, positions))
        x = self.model.norm(x)
        return head(x, self.lm_head.weight) if head else self.lm_head(x)


def first_places(rows, n):
    """Where each of a stream's n tokens stands first in rows (B, T), counted row by row: (n,)."""
    places = torch.arange(rows.numel(), device=rows.device)
    first = places.new_full((n + 1,), rows.numel())                        # the last is padding's
    return first.scatter_reduce(0, rows.flatten() % (n + 1), places, "amin")[:n]


def twin(model):
    """A copy that does not train, for EMA and reference. It shares what is frozen in the model."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def unshard(tensor):
    """A tensor in one piece: FSDP2's shards are gathered (by all together), others left alone."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ------------------------------------------------------------------------- LoRA
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank, W x + (alpha / rank) B A x
    (Hu et al., arXiv 2106.09685).

    A is drawn once and frozen, B starts at 0 and is trained (LoRA-FA, arXiv 2308.03303). That is
    for the EMA's sake: the average of two A's times the average of two B's is not the average of
    the products; with one common A it is. So [9] of Algorithm 1 moves the weights themselves, and
    policy, EMA and reference differ in B alone.
    """

    def __init__(self, linear, rank, alpha, rng):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        rows, columns = linear.weight.shape
        A = torch.randn(rank, columns, generator=rng) / columns ** 0.5
        self.lora_A = nn.Parameter(A.to(linear.weight.device), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=linear.weight.device))

    def forward(self, x):
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return linear(x, self.weight, self.bias) + self.scale * change

    def merged(self):
        """W + (alpha / rank) B A, in float32 or wider: (rows, columns)."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model, rank, alpha, rng, projections=PROJECTIONS):
    """Freeze a Transformer and put an adapter on each of the named projections; names stay."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in [n for n, _ in part.named_children() if n in projections]:
                setattr(part, name, LoRA(getattr(part, name), rank, alpha, rng))
    return model


def own_parameters(model):
    """{name: parameter} of what a run changes: all, or the adapters alone where there are any."""
    parameters = dict(model.named_parameters())
    return {k: p for k, p in parameters.items() if "lora_" in k} or parameters


# ------------------------------------------------------------------- generation
class KVCache:
    """Keys and values of all layers, (layers, 2, B, K, W, E). Slot w holds the text's token w."""

    def __init__(self, config, batch, width, dtype, device):
        if torch.device(device).type != "cpu":     # there, a few sizes are better than many
            width = -(-width // 64) * 64
        shape = (2, batch, config.num_key_value_heads, width, config.head_dim)
        self.slots = torch.zeros(config.num_hidden_layers, *shape, dtype=dtype, device=device)
        self.width = width

    def put(self, layer, positions, k, v):
        """Store (B, K, T, E). From a stream these are whole texts, and are returned; else one token
        a row, at its position (B, 1), and all keys and values up to `width` are returned."""
        if positions.dim() == 1:
            self.slots[layer, ..., :k.shape[2], :] = torch.stack((k, v))
            return k, v
        for slots, new in zip(self.slots[layer], (k, v)):
            slots.scatter_(2, positions[:, None, :, None].expand_as(new), new)
        return self.slots[layer, ..., :self.width, :]


def sample(logits, uniform, temperature, top_k, top_p):
    """One token a row from logits (B, V): temperature, then top-k, then top-p (nucleus): (B,).

    uniform (B,) in [0, 1). temperature 0 is greedy, top_k 0 and top_p 1 keep everything. The draw
    inverts the cumulative distribution of the kept tokens, most probable first, so equal uniforms
    give equal tokens whatever stands in the other rows.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = _filtered(logits, temperature, top_k, top_p)
    cumulative = probs.cumsum(-1)
    pick = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, pick.clamp(max=probs.shape[-1] - 1))[:, 0]


def _filtered(logits, temperature, top_k, top_p):
    """(probs, tokens), both (B, k), most probable first; what top-p removes has probability 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if 0 < top_k < logits.shape[-1]:
        top, order = logits.topk(top_k, -1)
    else:
        top, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = top.softmax(-1)
    if top_p < 1:                          # a token stays while those before it hold less
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    return probs, order


def ignore(_):
    """For those who want to hear of neither stages nor tokens."""


@torch.inference_mode()
def generate(model, prompts, budgets, eos=(), temperature=1.0, top_k=0, top_p=1.0, rng=None,
             vocab=None, ban=(), lap=ignore, see=ignore):
    """Continue each prompt (a list of ids) by at most its budget, up to and including a token of
    `eos`: a list of lists. ValueError if a prompt is empty.

    rng: a CPU torch.Generator, not needed at temperature 0. Ids from `vocab` on (a padded embedding
    has more rows than there are tokens) and those of `ban` are never sampled. lap(stage) is
    called after "prefill" and "decode", see(tokens (B,)) after each token but the last.
    """
    if not all(prompts):
        raise ValueError("each prompt needs at least one token (BOS for an empty text)")
    if max(budgets, default=0) < 1:
        return [[] for _ in prompts]
    embedding, steps = model.model.embed_tokens.weight, max(budgets)
    device, width = embedding.device, max(map(len, prompts)) + steps
    tensor = partial(torch.tensor, dtype=torch.long, device=device)
    uniform = pad_sequence(_uniforms(budgets, temperature, rng), True).to(device)     # (B, steps)
    ids = tensor([token for prompt in prompts for token in prompt])        # (N,)
    lengths = tensor([[len(prompt)] for prompt in prompts])                # (B, 1)
    rows = pad_sequence(torch.arange(len(ids)).split([*map(len, prompts)]), True, -1).to(device)
    ends = lengths[:, 0].cumsum(0) - 1                                     # (B,), of the prompts
    budgets = tensor(budgets)[:, None]                                     # (B, 1)
    stops, banned = tensor(sorted(eos)), tensor([i for i in ban if i < (vocab or len(embedding))])
    cache = KVCache(model.config, len(prompts), width, embedding.dtype, device)
    out = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
    turn = torch.zeros_like(lengths)       # how many times the rows were asked
    made, done = torch.zeros_like(lengths), budgets <= 0                   # tokens generated so far

    def choose():                          # works in place, as `read` does, for a CUDA graph
        logits.index_fill_(1, banned, -torch.inf)
        draw = uniform.gather(1, turn)[:, 0]                               # (B,)
        token = sample(logits[:, :vocab], draw, temperature, top_k, top_p)[:, None]
        out.scatter_(1, turn, token)
        made.add_(~done)
        done.logical_or_((made >= budgets) | (token == stops).any(-1, keepdim=True))

    def read():          # a finished row goes on reading behind its last token, and nobody looks
        token = out.gather(1, turn)
        logits.copy_(model(token, positions=lengths + made - 1, cache=cache)[:, 0])
        turn.add_(1)
        choose()

    logits = model(ids, rows, cache=cache, head=lambda h, weight: linear(h[ends], weight))
    choose()
    lap("prefill")
    for step in range(1, steps):
        see(out[:, step - 1])
        if (device.type == "cpu" or step % 16 == 0) and bool(done.all()):  # a GPU waits to be asked
            break
        if device.type == "cpu":
            cache.width = width - steps + step     # what is still empty need not be read
        read()
        if device.type == "cuda" and step == 1 and steps > 8:
            graph = torch.cuda.CUDAGraph()         # one launch for hundreds of kernels
            with torch.cuda.graph(graph):
                read()
            read = graph.replay
    lap("decode")
    return [row[:n] for row, n in zip(out.tolist(), made[:, 0].tolist())]


def _uniforms(budgets, temperature, rng):
    """Random numbers in [0, 1) for each row. All are drawn first, row after row, so that a row's
    text does not depend on its batch, rounding aside."""
    uniform = torch.zeros(sum(budgets), dtype=torch.float64)
    return (uniform.uniform_(generator=rng) if temperature else uniform).split(list(budgets))
