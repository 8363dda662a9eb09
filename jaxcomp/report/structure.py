"""What a model is made of, as a tree for a terminal: nodes, shapes, grids, sites."""

import dataclasses
from typing import Any

import jax
from rich.markup import escape
from rich.tree import Tree

from jaxcomp.core.linear import Linear
from jaxcomp.core.quantize import QTensor
from jaxcomp.core.site import Site
from jaxcomp.core.struct import NODES, is_static
from jaxcomp.core.transforms import Hadamard, Kron, Transform
from jaxcomp.models.decoder import Decoder, block_struct
from jaxcomp.models.patch import Patch


def structure_tree(model: Decoder, every_block: bool = False) -> Tree:
    """The parts of `model`, from shapes alone; equal neighbouring blocks are one entry."""
    root = Tree("[bold]model[/]")
    for field in dataclasses.fields(model.config):
        value = getattr(model.config, field.name)
        root.add(f"[dim]{field.name}[/] {escape(str(value))}")
    if model.kept is not None:
        root.add(f"[dim]kept of the original's blocks[/] {', '.join(map(str, model.kept))}")
    if model.stream is not None:
        sizes = ", ".join(f"{size:.4g}" for size in model.stream)
        root.add(f"[dim]size of the residual stream in every block[/] {sizes}")
    _add(root, "embed", model.embed)
    structs = [block_struct(block) for block in model.blocks]
    runs: list[list[int]] = []
    for i, struct in enumerate(structs):
        same = runs and not every_block and _form(struct) == _form(structs[runs[-1][0]])
        runs[-1].append(i) if same else runs.append([i])
    for run in runs:
        name = f"blocks.{run[0]}" + (f" … blocks.{run[-1]}" if len(run) > 1 else "")
        _add(root, name, structs[run[0]])
    _add(root, "norm", model.norm)
    _add(root, "lm_head", model.lm_head)
    return root


def weight_text(weight: Any) -> str:
    """One line about a weight: shape, and dtype or grid."""
    shape = " × ".join(map(str, weight.shape)) or "scalar"
    if not isinstance(weight, QTensor):
        return f"{shape} {weight.dtype}"
    groups, columns = weight.scale.shape[-2:]
    if columns == 1 and weight.shape[-1] > 1:
        grid = "per tensor"
    elif groups == 1:
        grid = "per channel"
    else:
        grid = f"groups of {weight.in_ch // groups}"
    sign = "symmetric" if weight.zero_point is None else "asymmetric"
    return f"{shape} [cyan]{weight.bits} bit[/], {grid}, {sign}"


def site_text(site: Site) -> str:
    """One line about a site: its transforms in order, then its grid."""
    parts = [_transform_text(t) for t in site.transforms]
    if (q := site.quantizer) is not None:
        clip = "" if q.clip is None else ", clipped"
        parts.append(f"[cyan]{q.spec}{clip}{', as codes' if q.integer else ''}[/]")
    return " → ".join(parts) or "as it is"


def patch_text(patch: Patch) -> str:
    """One line about a patch: its transforms in order."""
    first = ", the first token left alone" if patch.skip_first else ""
    return (" → ".join(map(_transform_text, patch.transforms)) or "as it is") + first


def _transform_text(t: Transform) -> str:
    if isinstance(t, Hadamard):
        name = "Hadamardᵀ" if t.transposed else "Hadamard"
        return f"{name} {t.order}" + (f" ⊗ I{t.inner}" if t.inner > 1 else "")
    if isinstance(t, Kron):
        return " ⊗ ".join("I" if m is None else f"P{m.shape[0]}" for m in (t.left, t.right))
    return f"Diag {t.scale.shape[0]}"


def _add(parent: Tree, name: str, part: Any) -> None:
    if part is None or (isinstance(part, dict) and not part):
        return
    if isinstance(part, Linear):
        bias = "" if part.b is None else ", bias"
        parent.add(f"{name}  {weight_text(part.w)}{bias}")
    elif isinstance(part, Site):
        parent.add(f"{name}  {site_text(part)}")
    elif isinstance(part, Patch):
        parent.add(f"{name}  {patch_text(part)}")
    elif isinstance(part, QTensor) or hasattr(part, "dtype"):
        parent.add(f"{name}  {weight_text(part)}")
    elif isinstance(part, dict):
        branch = parent.add(name)
        for key, value in part.items():
            _add(branch, key, value)
    elif type(part) in NODES.values():
        fields = dataclasses.fields(part)
        facts = ", ".join(
            f"{f.name}={_fact(getattr(part, f.name))}" for f in fields if is_static(f)
        )
        label = f"{name}  [bold]{type(part).__name__}[/]"
        children = {f.name: getattr(part, f.name) for f in fields if not is_static(f)}
        if len(children) == 1 and hasattr(child := next(iter(children.values())), "shape"):
            label, children = f"{label}  {weight_text(child)}", {}
        branch = parent.add(f"{label}  [dim]{escape(facts)}[/]" if facts else label)
        for key, value in children.items():
            _add(branch, key, value)


def _fact(value: Any) -> str:
    """A static value; of a dataclass only the fields that are not at their default."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    fields = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
    inside = ", ".join(f"{f.name}={getattr(value, f.name)}" for f in fields)
    return f"{type(value).__name__}({inside})"


def _form(struct: Any) -> Any:
    leaves, form = jax.tree.flatten(struct)
    return form, [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
