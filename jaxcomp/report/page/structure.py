"""The nodes of a model on the page, as the list that a terminal shows as a tree."""

from rich.text import Text
from rich.tree import Tree

from jaxcomp.models.decoder import Decoder
from jaxcomp.report.page.markup import Html, el
from jaxcomp.report.structure import structure_tree


def structure_list(model: Decoder) -> Html:
    """The parts of `model`, from shapes alone; equal neighbouring blocks are one entry."""
    return el("ul", [_entry(child) for child in structure_tree(model).children], class_="tree")


def _entry(tree: Tree) -> Html:
    name, _, rest = Text.from_markup(str(tree.label)).plain.partition("  ")
    inner = el("ul", [_entry(child) for child in tree.children]) if tree.children else None
    return el("li", el("b", name) if rest else name, f" {rest}" if rest else None, inner)
