"""Pages that need no other file: templates filled in, with pictures inside."""

import base64
from typing import Any

import jinja2

from models.reports.tables import NONE
from models.runs import flat


def page(template: str, **values: Any) -> str:
    """Return a page of templates/; values are escaped."""
    return _TEMPLATES.get_template(template).render(values)


def _embedded(image: bytes) -> str:
    """Return a picture, PNG or GIF, as an address."""
    kind = "gif" if image.startswith(b"GIF8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _plain(value: Any) -> str:
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("models.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update(embedded=_embedded, flat=flat, plain=_plain)
