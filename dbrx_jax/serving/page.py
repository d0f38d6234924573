"""The chat page, a file of this package, with headers that allow it nothing beyond this server."""

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse, Response

from dbrx_jax.serving.errors import ApiError

INLINE = re.compile(r"<(script|style)[^>]*>(.*?)</\1>", re.DOTALL)


def page_response() -> Response:
    """Returns the page.

    Raises:
      ApiError: the package has none.
    """
    file = resources.files("dbrx_jax.serving") / "page" / "index.html"
    if not file.is_file():
        raise ApiError(404, "there is no page here; the API begins at /v1", code="not_found")
    html = file.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def content_security_policy(html: str) -> str:
    """Returns a policy that allows the page's own scripts and styles, by their digests, and requests to this server."""
    digests: dict[str, list[str]] = {"script": [], "style": []}
    none = ["'none'"]
    for match in INLINE.finditer(html):
        digest = base64.b64encode(hashlib.sha256(match[2].encode()).digest()).decode()
        digests[match[1]].append(f"'sha256-{digest}'")
    rules = [
        "default-src 'none'",
        f"script-src {' '.join(digests['script'] or none)}",
        f"style-src {' '.join(digests['style'] or none)}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return "; ".join(rules)
