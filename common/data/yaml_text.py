"""Read YAML, in which a key that is given twice, or a value that contains itself, is an error."""

from typing import Any

import yaml


def load(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        yaml.YAMLError: the text is no YAML, or has a key twice, or a value that contains itself.
    """
    return construct(compose(text))


def compose(text: str) -> yaml.Node | None:
    """Return the tree of a YAML text, None for an empty one; errors as for `load`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        _check(root, ())
    return root


def construct(root: yaml.Node | None) -> Any:
    """Return the content of a tree; errors as for `load`."""
    try:
        return None if root is None else yaml.SafeLoader("").construct_document(root)
    except ValueError as error:  # such as the date 2026-13-45
        raise yaml.YAMLError(str(error)) from None


def _check(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    if any(node is one for one in above):
        raise _problem("a value contains itself by its anchor", node)
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check(value, (*above, node))
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _problem(f"{key.value} is given twice; remove one", key)
            seen.add(str(key.value))
            _check(value, (*above, node))


def _problem(message: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {node.start_mark.line + 1}: {message}")
