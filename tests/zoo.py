"""Tiny models for tests: MoE language models of transformers with random weights, and modules written by
hand.

`build(name, experts)` gives (model, inputs). Sizes are chosen so that they coincide (T = D = 32, head_dim = E
= 8): a pass that searches by size gets them wrong.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

WIDTH, LAYERS, EXPERTS, TOP_K, VOCAB = 32, 2, 8, 2, 128

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "jamba",
    "granitemoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "lfm2_moe",
    "afmoe",
)
"""Families that development looks at."""
OTHERS = ("nemotron_h", "phimoe", "qwen3_next")
"""Families that the passes were not designed for."""

MOE_LAYERS = {"deepseek_v2": 1, "deepseek_v3": 1, "lfm2_moe": 1, "afmoe": 1, "nemotron_h": 1}
"""MoE layers of a model where it is not all of them."""

_SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS,
    num_experts_per_tok=TOP_K, n_shared_experts=1, num_shared_experts=1, n_group=2, topk_group=1, num_expert_group=2,
    first_k_dense_replace=1, num_dense_layers=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, qk_head_dim=16, max_position_embeddings=128, sliding_window=8, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, output_router_logits=True, linear_num_value_heads=4, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4, mamba_d_state=8, mamba_d_conv=4,
    mamba_expand=2, mamba_dt_rank=4, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8,
    conv_L_cache=3, use_mamba_kernels=False,
)  # fmt: skip
_UNSET = object()
_OVERRIDES: dict[str, dict] = {
    "granitemoe": {"output_router_logits": False},
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": _UNSET},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": _UNSET},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}


def _config(family: str, **sizes):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    default = kind()
    known = {k: v for k, v in _SIZES.items() if hasattr(default, k) and k not in getattr(default, "attribute_map", {})}
    known |= _OVERRIDES.get(family, {}) | sizes
    return kind(**{k: v for k, v in known.items() if v is not _UNSET})


def build(name: str, experts: str = "batched_mm", seed: int = 0, **sizes) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in train mode with example inputs.

    Args:
        name: a transformers family, or a module of `HANDWRITTEN` or `NEGATIVES`.
        experts: `batched_mm` (fp32) or `grouped_mm` (bf16: torch cannot train fp32 grouped products under
          compile).
        sizes: values of the family's configuration to change.
    """
    torch.manual_seed(seed)
    if name in HANDWRITTEN or name in NEGATIVES:
        made = (HANDWRITTEN.get(name) or NEGATIVES[name])()
        dtype = torch.bfloat16 if experts == "grouped_mm" else torch.float32
        return made.to(dtype).train(), {"x": torch.randn(2, 16, WIDTH).to(dtype)}
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    model = transformers.AutoModelForCausalLM.from_config(_config(name, **sizes), experts_implementation=experts)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "bias" in key:  # zero biases would hide mistakes
                param.normal_(std=0.1)
    if experts == "grouped_mm":
        model = model.bfloat16()
    return model.train(), tokens(2, 16)


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (batch, length))
    return {"input_ids": ids, "labels": ids}


def loss_of(output) -> Tensor:
    if getattr(output, "loss", None) is not None:
        return output.loss
    value = output if isinstance(output, Tensor) else output[0]
    return value.float().pow(2).mean()


# ---- modules written by hand ----------------------------------------------------------------------------------------


class HandMoE(nn.Module):
    """Softmax router, two-layer experts; `forward` differs in how rows reach experts and come back."""

    top_k = 2

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) * 0.2)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) * 0.2)

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(self.router(h), -1).topk(self.top_k, -1)

    def act(self, a: Tensor) -> Tensor:
        return torch.relu(a)

    def experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        a = self.act(torch.bmm(self.up[ids], rows.unsqueeze(-1)).squeeze(-1) + self.up_bias[ids])
        return torch.bmm(self.down[ids], a.unsqueeze(-1)).squeeze(-1)

    def mix(self, h: Tensor) -> Tensor:
        w, i = self.route(h)
        y = self.experts(h.repeat_interleave(self.top_k, dim=0), i.reshape(-1))
        return (y * w.reshape(-1, 1)).view(h.shape[0], self.top_k, WIDTH).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.reshape(-1, WIDTH)).view_as(x)


class WeightBeforeExperts(HandMoE):
    def mix(self, h):
        w, i = self.route(h)
        rows = h.repeat_interleave(self.top_k, dim=0) * w.reshape(-1, 1)
        return self.experts(rows, i.reshape(-1)).view(h.shape[0], self.top_k, WIDTH).sum(1)


class ExpandDispatch(HandMoE):
    def mix(self, h):
        w, i = self.route(h)
        rows = h.unsqueeze(1).expand(h.shape[0], self.top_k, WIDTH).reshape(-1, WIDTH)
        y = self.experts(rows, i.reshape(-1)).view(h.shape[0], self.top_k, WIDTH)
        return (y * w.unsqueeze(-1)).sum(1)


class IndexAddCombine(HandMoE):
    def mix(self, h):
        w, i = self.route(h)
        ids, order = torch.sort(i.reshape(-1))
        token = order // self.top_k
        y = self.experts(h[token], ids) * w.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(h).index_add(0, token, y)


class IndexAddInPlace(HandMoE):
    def mix(self, h):
        w, i = self.route(h)
        ids, order = torch.sort(i.reshape(-1))
        token = order // self.top_k
        y = self.experts(h[token], ids) * w.reshape(-1)[order].unsqueeze(-1)
        out = torch.zeros_like(h)
        out.index_add_(0, token, y)
        return out * 1.0


class SortedBack(HandMoE):
    """Rows are put back by writing them at the places they came from."""

    def mix(self, h):
        w, i = self.route(h)
        ids, order = torch.sort(i.reshape(-1))
        y = self.experts(h[order // self.top_k], ids)
        back = torch.empty_like(y)
        back[order] = y
        return torch.einsum("tkd,tk->td", back.view(-1, self.top_k, WIDTH), w)


class TopOne(HandMoE):
    top_k = 1


class TopOneArgmax(HandMoE):
    """Ids [T], no dim of choices anywhere, the token states themselves are the rows."""

    def mix(self, h):
        p = torch.softmax(self.router(h), -1)
        w, i = p.max(-1)
        return self.experts(h, i) * w[:, None]


class AllExperts(HandMoE):
    """K = E: every token goes everywhere."""

    top_k = EXPERTS


class SigmoidBias(HandMoE):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("correction", torch.randn(EXPERTS) * 0.1)

    def route(self, h):
        p = torch.sigmoid(self.router(h))
        _, i = (p + self.correction).topk(self.top_k, -1)
        w = p.gather(-1, i)
        return w / w.sum(-1, keepdim=True), i


class TableRouted(HandMoE):
    """No router: a table says where a token goes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(0, EXPERTS, (64, 2)))

    def route(self, h):
        i = self.table[(h[:, 0].detach().abs() * 16).long().clamp(max=63)]
        return torch.full(i.shape, 0.5), i


class ScaledAct(HandMoE):
    """A shared parameter between the products, and a view of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(24) + 0.5)

    def act(self, a):
        return nn.functional.layer_norm(a, (24,), self.scale) * (1 + self.scale)


class WithEscape(HandMoE):
    """The experts' hidden rows are read elsewhere, too, as an auxiliary loss may do."""

    def mix(self, h):
        w, i = self.route(h)
        ids = i.reshape(-1)
        rows = h.repeat_interleave(self.top_k, dim=0)
        a = torch.bmm(self.up[ids], rows.unsqueeze(-1)).squeeze(-1)
        a.add_(self.up_bias[ids])
        y = torch.bmm(self.down[ids], torch.relu(a).unsqueeze(-1)).squeeze(-1)
        out = (y * w.reshape(-1, 1)).view(h.shape[0], self.top_k, WIDTH).sum(1)
        return out + a.pow(2).mean()


class GatheredEinsum(HandMoE):
    """Weights gathered by ids [T, K], products as einsum."""

    def mix(self, h):
        w, i = self.route(h)
        a = self.act(torch.einsum("td,tkfd->tkf", h, self.up[i]) + self.up_bias[i])
        y = torch.einsum("tkf,tkdf->tkd", a, self.down[i])
        return torch.einsum("tkd,tk->td", y, w)


class Unsorted(HandMoE):
    """As torchtitan has it: stable argsort, counts apart, rows written back into zeros, weighted sum by bmm."""

    def mix(self, h):
        w, i = self.route(h)
        flat = i.view(-1)
        order = torch.argsort(flat, stable=True)
        ids = flat[order]
        y = self.experts(h[order // self.top_k], ids)
        back = torch.zeros(h.shape[0] * self.top_k, WIDTH, dtype=y.dtype)
        back[order] = y
        rows = back.reshape(-1, self.top_k, WIDTH)
        return torch.bmm(w.reshape(-1, 1, self.top_k), rows).squeeze(1)


class GroupedUnsorted(Unsorted):
    """The same with grouped products; bf16 only."""

    def mix(self, h):
        w, i = self.route(h)
        flat = i.view(-1)
        counts = torch.histc(flat.float(), bins=EXPERTS, min=0, max=EXPERTS)
        order = torch.argsort(flat, stable=True)
        rows = h.gather(0, (order // self.top_k).reshape(-1, 1).expand(-1, WIDTH))
        rows = (rows.float() * w.view(-1)[order].reshape(-1, 1)).to(h.dtype)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        a = nn.functional.silu(torch._grouped_mm(rows, self.up.bfloat16().transpose(-2, -1), offs=offsets))
        y = torch._grouped_mm(a, self.down.bfloat16().transpose(-2, -1), offs=offsets).type_as(h)
        at = (order // self.top_k).reshape(-1, 1).expand(-1, WIDTH)
        return torch.zeros_like(h).scatter_add(0, at, y)


HANDWRITTEN: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        HandMoE, WeightBeforeExperts, ExpandDispatch, IndexAddCombine, IndexAddInPlace, SortedBack, TopOne,
        TopOneArgmax, AllExperts, SigmoidBias, TableRouted, ScaledAct, WithEscape, GatheredEinsum, Unsorted, GroupedUnsorted,
    )
}  # fmt: skip


# ---- modules that must not be taken for MoE -------------------------------------------------------------------------


class MixtureOfDepths(nn.Module):
    """Top-k over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 1)
        self.block = nn.Sequential(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        w, i = self.router(x).squeeze(-1).topk(8, dim=1)
        at = i.unsqueeze(-1).expand(-1, -1, WIDTH)
        return x.scatter_add(1, at, self.block(x.gather(1, at)) * w.sigmoid().unsqueeze(-1))


class Codebook(nn.Module):
    """Nearest code: an index selects rows of a parameter, no product follows."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(8, WIDTH))
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.project(x)
        i = torch.cdist(z.flatten(0, 1), self.codes).argmin(-1)
        q = self.codes[i].view_as(z)
        return z + (q - z).detach() + q * 0.1


class ProductKeyMemory(nn.Module):
    """Top-k over pairs of keys; values are summed by weight."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(2, 8, WIDTH // 2))
        self.memory = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, 2, WIDTH // 2)
        first, second = (h[:, 0] @ self.keys[0].t()).topk(2, -1), (h[:, 1] @ self.keys[1].t()).topk(2, -1)
        scores = (first[0][:, :, None] + second[0][:, None]).flatten(1)
        ids = (first[1][:, :, None] * 8 + second[1][:, None]).flatten(1)
        w, at = scores.topk(2, -1)
        rows = self.memory[ids.gather(1, at)]
        return x + (rows * w.softmax(-1).unsqueeze(-1)).sum(1).view_as(x)


class AuxiliaryLossOnly(nn.Module):
    """A router whose choices only feed a load-balancing loss."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x.reshape(-1, WIDTH)).softmax(-1)
        _, i = p.topk(2, -1)
        share = nn.functional.one_hot(i, EXPERTS).float().mean((0, 1))
        return self.dense(x) + (share * p.mean(0)).sum()


class BiasTable(nn.Module):
    """A 3-D parameter selected by an index, no product: relative position tables and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(16) % 5
        return x + self.table[at].sum(1)


NEGATIVES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (MixtureOfDepths, Codebook, ProductKeyMemory, AuxiliaryLossOnly, BiasTable)
}
