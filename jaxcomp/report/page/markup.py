"""HTML from Python values: what is not markup already is escaped, so no text can become markup."""

import html
from collections.abc import Iterable
from typing import Any

VOID = ("br", "input", "link", "meta", "path", "rect")  # written without an end


class Html(str):
    """Text that is markup. Joined to other text it becomes text again, and is escaped."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
      children: `Html` as it is, None left out, iterables taken apart, all else escaped.
      attributes: without a `_` at the end, and with `-` for `_` inside; None and False are left
        out, True stands without a value.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    inner = join(*children)
    if tag in VOID and not inner:
        return Html(f"<{tag}{written}>" if tag not in ("path", "rect") else f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{inner}</{tag}>")


def join(*children: Any) -> Html:
    """The children of an element, without it."""
    return Html("".join(_child(child) for child in children))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return join(*child)
    return html.escape(str(child), quote=False)


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
