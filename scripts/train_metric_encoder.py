"""Train an encoder on a store's images without labels, to score samples by: one that no snippet was made with.

    python -m scripts.train_metric_encoder --store data/glyphs --out weights/resnet18-glyphs.safetensors
    python -m evaluations.evaluator data/glyphs samples/NAME --encoder resnet18@64 \\
        --encoder-weights weights/resnet18-glyphs.safetensors

A distance in features that a label-trained classifier found important is blind to the rest, and one in the features of
the snippets' own encoder flatters whatever was conditioned on them. This network differs in architecture and objective:
a ResNet-18 (or the `--model` of timm) learns to tell two random views of one image (crop, rotation, contrast, noise)
from the views of all others in the batch (SimCLR: Chen et al. 2020, arXiv 2002.05709, equation 1). Beside the weights,
whose matrices are kept as float16, a JSON file says how it was made, and how often a held-out image's nearest training
image has its label, beside the same for random weights.

Reads the store, which needs its images (--keep-images), and STORE-holdout where there is one.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dataset import LatentDataset, holdout_path, rows_of_step
from memory.command import execute
from memory.files import atomic, check_folder, write_json
from memory.provenance import provenance
from models.encoder import Encoder, load_encoder
from models.kernels import fitting

SIZE = 64  # pixels that it looks at: 32 enlarged, because the stem alone shrinks by 4
PROJECTION = 128
QUERIES = 2_000  # held-out images in the nearest-neighbour check


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train an encoder on a store's images without labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--store", type=Path, required=True, help="store encoded with --keep-images")
    add("--out", type=Path, required=True, help="file of the weights, NAME.safetensors; NAME.json says how it was made")
    add("--model", default="resnet18", help="convolutional network of timm")
    add("--steps", type=int, default=3_000, help="of training")
    add("--batch-size", type=int, default=512, help="images a step, each in two views")
    add("--lr", type=float, default=1e-3, help="largest learning rate of AdamW; warmed up, then a half cosine")
    add("--temperature", type=float, default=0.2, help="of the softmax over similarities")
    add("--seed", type=int, default=0, help="of weights, order and views")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size"):
        if getattr(args, name) < 2:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 2")
    if not timm.is_model(args.model):
        parser.error(f"--model {args.model}: timm {timm.__version__} has no such model")
    if args.out.suffix != ".safetensors" or args.out.exists():
        parser.error(f"--out {args.out}: expected a new file that ends in .safetensors")
    if not (args.lr > 0 and args.temperature > 0) or args.seed < 0:
        parser.error("expected --lr and --temperature above 0, --seed at least 0")
    return args


def random_view(images: Tensor, size: int) -> Tensor:
    """A random view (B, 3, size, size) of each image (B, 3, H, W) in [−1, 1]: half to all of its area, turned by up to
    10 degrees, shifted, of other contrast and brightness, with noise."""
    count, device = len(images), images.device
    scale = torch.empty(count, device=device).uniform_(0.5, 1).sqrt()  # of a side
    angle = torch.empty(count, device=device).uniform_(-math.pi / 18, math.pi / 18)
    shift = torch.rand(count, 2, device=device).mul(2).sub(1) * (1 - scale)[:, None]  # inside the image
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (B, 2, 2)
    grid = F.affine_grid(torch.cat([affine, shift[:, :, None]], 2), [count, 3, size, size], align_corners=False)
    view = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(count, 1, 1, 1, device=device).uniform_(0.6, 1.4)
    brightness = torch.empty(count, 1, 1, 1, device=device).uniform_(-0.2, 0.2)
    return view * contrast + brightness + 0.05 * torch.randn_like(view)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding each view's other view among all others, from projections (B, D) of both views."""
    both = F.normalize(torch.cat([first, second]), dim=1)  # (2B, D)
    similarity = both @ both.T / temperature  # (2B, 2B)
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def train(network: nn.Module, store: LatentDataset, args: argparse.Namespace, device: torch.device) -> list[float]:
    """Fit a network to a store's images; the losses of all steps."""
    width = network.num_features
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION)).to(device)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4)
    warm = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / args.steps)) / 2)
    )
    images = torch.from_numpy(np.array(store.images)).to(device)  # (N, c, H, W)
    losses = []
    network.train()
    with tqdm(range(args.steps), unit="step") as bar:
        for step in bar:
            rows = torch.from_numpy(rows_of_step(len(store), args.batch_size, args.seed, step)).to(device)
            batch = images[rows].expand(-1, 3, -1, -1).float() / 127.5 - 1  # (B, 3, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                maps = [network.forward_features(random_view(batch, SIZE)) for _ in range(2)]
                projections = [head(network.forward_head(some, pre_logits=True)) for some in maps]  # (B, D) each
            loss = contrastive_loss(*(projection.float() for projection in projections), args.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % 50 == 0:
                bar.set_postfix(loss=float(losses[-1]), refresh=False)
    return torch.stack(losses).tolist()


def kept(tensor: Tensor) -> Tensor:
    """What the file holds of a tensor: matrices as float16, which halves it; statistics and biases as they are."""
    return (tensor.half() if tensor.ndim > 1 else tensor).contiguous().cpu()


def neighbour_accuracy(encoder: Encoder, store: LatentDataset, holdout: LatentDataset) -> float:
    """Share of held-out images whose nearest training image, by the cosine of features, has their label."""

    def features(data: LatentDataset, count: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(count) * len(data) // count
        parts = [torch.from_numpy(np.array(data.images[part.numpy()])) for part in rows.split(512)]
        found = torch.cat([F.normalize(encoder(part), dim=1) for part in parts])
        return found, torch.from_numpy(np.array(data.labels))[rows]

    known, labels = features(store, len(store))
    queries, wanted = features(holdout, min(QUERIES, len(holdout)))
    nearest = torch.cat([(part @ known.T).argmax(1) for part in queries.split(256)]).cpu()
    return float((labels[nearest] == wanted).float().mean())


@fitting("try a smaller --batch-size")
def main(argv: list[str] | None = None) -> None:
    """Check, train, write, and say what the features know."""
    args, began = parse(argv), time.perf_counter()
    check_folder("--out", args.out.parent)
    store, beside = LatentDataset(args.store, images=True), holdout_path(args.store)
    holdout = LatentDataset(beside, images=True) if beside.is_dir() else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    network = timm.create_model(args.model, pretrained=False).to(device, memory_format=torch.channels_last)
    torch.nn.init.zeros_(network.get_classifier().weight)  # not trained, but of the format
    untrained = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    losses = train(network, store, args, device)

    accuracy = {}
    with atomic(args.out) as temporary:
        for name, state in (("random weights", untrained), ("trained", network.state_dict())):
            save_file({key: kept(tensor) for key, tensor in state.items()}, temporary)
            if holdout is not None and store.meta["num_classes"]:
                encoder = load_encoder(f"{args.model}@{SIZE}", temporary, device)
                accuracy[name] = round(neighbour_accuracy(encoder, store, holdout), 4)
    facts = {"encoder": f"{args.model}@{SIZE}", "store_fingerprint": store.meta["fingerprint"], "steps": args.steps}
    facts |= {"batch_size": args.batch_size, "lr": args.lr, "temperature": args.temperature, "seed": args.seed}
    facts |= {"first_loss": losses[0], "last_loss": float(np.mean(losses[-50:])), "nearest_has_the_label": accuracy}
    made = provenance(argv) | {"seconds": round(time.perf_counter() - began, 1)}
    write_json(args.out.with_suffix(".json"), facts | {"run": made})
    print(
        f"wrote {args.out}: loss {losses[0]:.3f} -> {facts['last_loss']:.3f}; {accuracy or 'no labels to check with'}"
    )


if __name__ == "__main__":
    execute(main)
