"""SiT: a transformer on latent patches that predicts a velocity, conditioned through adaLN-Zero.

The network of SiT (arXiv 2401.08740) and DiT (arXiv 2212.09748), with GMem's snippet condition (arXiv 2412.08781) and
REPA's alignment heads (arXiv 2410.06940). Parameters carry the names of the published weights.

Shapes: B batch, C×H×W latent, T = (H/p)·(W/p) tokens, D width, F snippet dimension.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ALIGN_HIDDEN = 2048  # hidden width of an alignment head


@dataclass(frozen=True)
class Options:
    """What a network is besides its preset, by default as published. Dropouts are probabilities, of training alone."""

    input_size: int = 32  # height and width of the latent; a multiple of the patch size
    in_channels: int = 4  # C, of the latent and of the velocity
    condition: str = "snippet"  # a key of `conditions`
    snippet_dim: int = 768  # F
    snippet_dropout: float = 0.2  # of entries
    snippet_dropout_at: str = "embedding"  # of the projected snippet; "snippet": of itself, as in the second release
    snippet_scale: float = 1.0  # factor on the unit-norm snippet
    null_dropout: float = 0.0  # that a learned null embedding replaces the condition; 0 builds none
    num_classes: int = 1000  # label `num_classes` is the null label
    label_dropout: float = 0.1  # that a label becomes the null label
    label_scale: float = 1.0  # factor on the label's embedding
    align_dims: Sequence[int] = ()  # an alignment head for each, an MLP to that many features
    align_depth: int = 8  # the block whose tokens they take, from 1
    qk_norm: bool = False  # LayerNorm on queries and keys; not in the published networks


class TimestepEmbedder(nn.Module):
    """Times (B,) in [0, 1] → (B, D): sinusoidal features of the unscaled time, then a two-layer MLP.

    All in float32 whatever the autocast, because bf16 cannot tell neighbouring times apart.
    """

    num_features = 256
    max_period = 10_000

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.num_features, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, t: Tensor) -> Tensor:
        """128 cosines, then 128 sines, of periods from 2π to 20,000π."""
        half = self.num_features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) * exponents)  # (B, 128)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 256)

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast("cuda" if t.is_cuda else "cpu", enabled=False):  # the meta device has none
            return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """Labels (B,) in [0, num_classes] → (B, D), scaled; the last row of the table is the null label.

    While training, a label whose uniform number lies below `label_dropout` becomes the null label.
    """

    def __init__(self, width: int, options: Options):
        super().__init__()
        self.num_classes, self.dropout, self.scale = options.num_classes, options.label_dropout, options.label_scale
        self.embedding_table = nn.Embedding(self.num_classes + 1, width)

    def forward(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        if self.training:
            labels = torch.where(uniforms < self.dropout, self.num_classes, labels)
        return self.scale * self.embedding_table(labels)  # (B, D)


class SnippetProjection(nn.Module):
    """Snippets (B, F) → (B, D): unit norm × scale, then a linear map; dropout after it (as published) or before."""

    def __init__(self, width: int, options: Options):
        super().__init__()
        self.scale, self.dropout_at = options.snippet_scale, options.snippet_dropout_at
        if self.dropout_at not in ("embedding", "snippet"):
            raise ValueError(f"snippet_dropout_at={self.dropout_at!r}: expected 'embedding' or 'snippet'")
        self.linear = nn.Linear(options.snippet_dim, width)
        self.dropout = nn.Dropout(options.snippet_dropout)

    def forward(self, snippets: Tensor) -> Tensor:
        wide = torch.promote_types(torch.float32, self.linear.weight.dtype)
        snippets = F.normalize(snippets.to(wide), dim=-1) * self.scale  # (B, F)
        if self.dropout_at == "snippet":
            return self.linear(self.dropout(snippets))  # (B, D)
        return self.dropout(self.linear(snippets))  # (B, D)


class Condition(nn.Module):
    """Base of the ways to condition: a module that embeds `cond`, to be added to the time embedding.

    It is built as `cls(width, options)`, with the network's `Options`. Its direct children become direct children of
    the network, because that is where published weights have them.

    Attributes:
        reads: what of an image `cond` holds, for training and sampling to supply: "label", (B,) long, and "snippet",
            (B, F) float, or one of them. Two are a pair in this order; without any `cond` is None.
    """

    reads: tuple[str, ...] = ()

    @classmethod
    def cond(cls, given: dict[str, Tensor]) -> object:
        """`cond`, from what is known of images: "label" (B,), "snippet" (B, F)."""
        found = tuple(given[kind] for kind in cls.reads)
        return found if len(found) > 1 else found[0] if found else None

    def forward(self, cond: object, uniforms: Tensor) -> Tensor:
        """The embedding (B, D) of `cond`; the uniform numbers (B,) decide random drops."""
        raise NotImplementedError

    def null(self, batch_size: int, device: torch.device) -> object:
        """A `cond` that means "no condition" in a network without a learned null embedding; ValueError if none does."""
        raise ValueError(
            "cond=None: this network has no null condition; train it with --model-options null_dropout=0.1, or pass a "
            "condition"
        )


class NoCondition(Condition):
    """Unconditional: only the time is embedded."""

    def __init__(self, width: int, options: Options):
        super().__init__()
        self.width = width

    def forward(self, cond: None, uniforms: Tensor) -> Tensor:
        return uniforms.new_zeros(len(uniforms), self.width)  # (B, D)

    def null(self, batch_size: int, device: torch.device) -> None:
        return None


class LabelCondition(Condition):
    """A class label, `cond` (B,) long."""

    reads = ("label",)

    def __init__(self, width: int, options: Options):
        super().__init__()
        self.y_embedder = LabelEmbedder(width, options)

    def forward(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        return self.y_embedder(labels, uniforms)

    def null(self, batch_size: int, device: torch.device) -> Tensor:
        return torch.full((batch_size,), self.y_embedder.num_classes, device=device)


class SnippetCondition(Condition):
    """A snippet of the memory bank, `cond` (B, F) float: GMem's condition."""

    reads = ("snippet",)

    def __init__(self, width: int, options: Options):
        super().__init__()
        self.condition_projection = SnippetProjection(width, options)

    def forward(self, snippets: Tensor, uniforms: Tensor) -> Tensor:
        return self.condition_projection(snippets)


class LabelSnippetCondition(Condition):
    """A label and a snippet, `cond` a pair (labels (B,), snippets (B, F)); their embeddings are added."""

    reads = ("label", "snippet")

    def __init__(self, width: int, options: Options):
        super().__init__()
        self.y_embedder, self.condition_projection = LabelEmbedder(width, options), SnippetProjection(width, options)

    def forward(self, cond: tuple[Tensor, Tensor], uniforms: Tensor) -> Tensor:
        labels, snippets = cond
        return self.y_embedder(labels, uniforms) + self.condition_projection(snippets)


conditions: dict[str, type[Condition]] = {
    "snippet": SnippetCondition,
    "label": LabelCondition,
    "label+snippet": LabelSnippetCondition,
    "none": NoCondition,
}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift for x (B, T, D) and shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """Pre-norm attention and MLP; shift, scale and gate come from the condition, and zero gates give the identity."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # (B, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))  # (B, T, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, T, D)


class FinalLayer(nn.Module):
    """LayerNorm, modulation by the condition, and a linear map of tokens (B, T, D) to patches (B, T, p²·C)."""

    def __init__(self, width: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, T, p²·C)


class SiT(nn.Module):
    """The velocity network v_θ(x_t, t, cond), built through `SiT_models`: a name fixes depth, width, heads and patch;
    `options` are fields of `Options`. `config` says both in plain values.

    Raises:
        ValueError: an unknown condition, a latent that patches do not tile, heads beyond the last block, or a dropout
            outside [0, 1).
    """

    def __init__(self, *, name: str, depth: int, width: int, num_heads: int, patch_size: int, **options: object):
        super().__init__()
        options = Options(**options)
        input_size, in_channels, align_depth = options.input_size, options.in_channels, options.align_depth
        if options.condition not in conditions:
            raise ValueError(f"condition={options.condition!r}: expected one of {', '.join(conditions)}")
        if input_size % patch_size:
            sizes = f"input_size={input_size} is not a multiple of the patch size {patch_size} of {name}"
            raise ValueError(f"{sizes}: encode the store at another --image-size, or take a --model NAME/1")
        if options.align_dims and not 1 <= align_depth <= depth:
            remedy = f"choose one, as --model-options align_depth={(depth + 1) // 2}"
            raise ValueError(f"align_depth={align_depth}: {name} has blocks 1 to {depth}; {remedy}")
        self.config = {"model": name, **asdict(options), "align_dims": list(options.align_dims)}
        for option in ("snippet_dropout", "null_dropout", "label_dropout"):
            if not 0 <= self.config[option] < 1:
                raise ValueError(f"{option}={self.config[option]}: expected a probability in [0, 1)")
        self.latent_shape = (in_channels, input_size, input_size)
        self.patch_size, self.align_depth = patch_size, align_depth
        self.condition, self.null_dropout = options.condition, options.null_dropout
        self.checkpoint_activations = False  # True: training keeps only the blocks' inputs and computes the rest again

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, width, bias=True)
        self.pos_embed = nn.Parameter(position_embedding(width, input_size // patch_size), requires_grad=False)
        self.t_embedder = TimestepEmbedder(width)
        embed_condition = conditions[self.condition](width, options)
        for part, module in embed_condition.named_children():
            self.add_module(part, module)
        self._embed_condition = [embed_condition]  # in a list: not a child of its own, its parts already are
        if self.null_dropout > 0:
            self.null_embedding = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(SiTBlock(width, num_heads, options.qk_norm) for _ in range(depth))
        self.projectors = nn.ModuleList(alignment_head(width, dim) for dim in options.align_dims)
        self.final_layer = FinalLayer(width, patch_size, in_channels)
        self.initialize()

    def initialize(self) -> None:
        """Xavier linears, N(0, 0.02) embeddings, zero adaLN and output layers: the first velocity is exactly zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # the convolution is a linear map of patches
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.null_dropout > 0:
            nn.init.normal_(self.null_embedding, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def reads(self) -> tuple[str, ...]:
        """What the condition reads of an image, "label" and "snippet" or one of them."""
        return conditions[self.condition].reads

    def embed_condition(self, cond: object, batch_size: int, uniforms: Tensor | None) -> Tensor:
        """The condition's embedding (B, D), after the drops of a training step.

        `uniforms` (B, 2) in [0, 1) decide them: column 0 the null embedding, column 1 the null label.
        """
        embed = self._embed_condition[0]
        if uniforms is None:
            numbers = torch.rand if self.training else torch.ones  # 1 lies above any probability: nothing is dropped
            uniforms = numbers(batch_size, 2, device=self.pos_embed.device)
        if cond is None and self.null_dropout > 0:
            return self.null_embedding.expand(batch_size, -1)  # (B, D)
        if cond is None:
            cond = embed.null(batch_size, self.pos_embed.device)
        c = embed(cond, uniforms[:, 1])  # (B, D)
        if self.training and self.null_dropout > 0:
            c = torch.where(uniforms[:, :1] < self.null_dropout, self.null_embedding.to(c.dtype), c)
        return c

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, T, p·p·C), rows first, to an image (B, C, H, W)."""
        channels, height, width = self.latent_shape
        p = self.patch_size
        grid = patches.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, channels))  # (B, h, w, p, q, C)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.latent_shape)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: object = None,
        return_tokens: bool = False,
        uniforms: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The velocity at `x` (B, C, H, W) and `t` (B,) in [0, 1].

        Args:
            cond: what the condition takes: (B, F) float, (B,) long, a pair (labels, snippets), or None for the null.
            return_tokens: also return the alignment heads' outputs, a list of (B, T, align_dim).
            uniforms: (B, 2) in [0, 1), the random numbers of the drops; drawn from torch's generator if not given.
        """
        c = self.t_embedder(t) + self.embed_condition(cond, len(x), uniforms)  # (B, D)
        return self.velocity(x, c, return_tokens)

    def velocity(self, x: Tensor, c: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """`forward` from c (B, D) on, the sum of both embeddings: samplers embed a condition once for all steps."""
        tokens = []
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        run = checkpointed if self.checkpoint_activations else nn.Module.__call__
        for depth, block in enumerate(self.blocks, start=1):
            x = run(block, x, c)  # (B, T, D)
            if return_tokens and depth == self.align_depth:
                tokens = [head(x) for head in self.projectors]  # (B, T, F) each
        velocity = self.unpatchify(self.final_layer(x, c))  # (B, C, H, W)
        return (velocity, tokens) if return_tokens else velocity


def checkpointed(part: Callable, *inputs: object) -> object:
    """`part(*inputs)` whose activations are computed again in the backward pass (Chen et al., arXiv 1604.06174)."""
    return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)  # blocks draw no random numbers


def alignment_head(width: int, dim: int) -> nn.Sequential:
    """REPA's projection of tokens (B, T, D) to an encoder's feature space (B, T, dim)."""
    first, second = nn.Linear(width, ALIGN_HIDDEN), nn.Linear(ALIGN_HIDDEN, ALIGN_HIDDEN)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Linear(ALIGN_HIDDEN, dim))


def position_embedding(width: int, grid_size: int) -> Tensor:
    """Fixed 2-D sin-cos positions (1, T, D) of a square grid, rows first: half of D codes the column, half the row.

    Raises:
        ValueError: D is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, which 2-D sin-cos positions need")
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (G, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, D/2)
    columns = line[None].expand(grid_size, -1, -1)  # (G, G, D/2), depends on w
    rows = line[:, None].expand(-1, grid_size, -1)  # (G, G, D/2), depends on h
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].float()


# Depth, width and heads; Ti is small enough for a CPU.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "Ti": (6, 192, 3)}
SiT_models: dict[str, Callable[..., SiT]] = {
    f"SiT-{size}/{patch}": partial(
        SiT, name=f"SiT-{size}/{patch}", depth=depth, width=width, num_heads=heads, patch_size=patch
    )
    for size, (depth, width, heads) in SIZES.items()
    for patch in (1, 2, 4, 8)
}
