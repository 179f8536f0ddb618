"""The decoder: Llama and its close relatives, written out by hand, with loading, saving and batched generation.

Holds the architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU), the KV cache, `sample` and
`generate`, LoRA, and Hugging Face folders of safetensors in and out. Leaves out tokenizers, training and processes.
Parameter names are the checkpoint's own, so loading needs no renaming table and is strict.

Axes: B rows, T tokens, D hidden size, H query heads, K key-value heads, E head size, V vocabulary, W cached keys;
      P trunk, S branch: a row may be [P trunk | S chosen | S rejected], see `Transformer.forward`.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LARGE = 2**17                                            # numbers of a matrix from which on `linear` takes its other product



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
