"""What pages are tried with: texts that mean harm, contrast, and axe-core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# WCAG 2.2, success criterion 1.4.3: text stands out 4.5 to 1.
FAINT = """
(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length === 3) return colour;
    }
  };
  return [...document.querySelectorAll("main *")].filter((one) => !one.closest("svg") && one.offsetParent
    && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
  ).filter((one) => {
    const both = [light(parts(getComputedStyle(one).color).slice(0, 3)), light(behind(one))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05) < 4.5;
  }).map((one) => one.outerHTML.slice(0, 80));
})()
"""
#: texts that would run a script, fetch something or change the page, if they were taken for more than text
PAYLOADS = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror='window.pwned=1'>",
    "<svg onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<iframe src=javascript:parent.pwned=1>",
    "<body onload=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>",
    "<input autofocus onfocus=window.pwned=1>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "<style>@import 'https://example.invalid/x.css';</style>",
    "<link rel=stylesheet href=https://example.invalid/x.css>",
    "<meta http-equiv=refresh content='0;url=https://example.invalid'>",
    "<base href=https://example.invalid/>",
    "<form action=https://example.invalid><button>x</button></form>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=window.pwned=1>",
    "<template><img src=x onerror=window.pwned=1></template>",
    "<object data=javascript:window.pwned=1>",
    "<video><source onerror=window.pwned=1></video>",
    "[x](javascript:window.pwned=1)",
    "[x](JaVaScRiPt:window.pwned=1)",
    "[x](&#106;avascript:window.pwned=1)",
    "[x](data:text/html,<script>window.pwned=1</script>)",
    "[x](vbscript:window.pwned=1)",
    "[x](https://example.invalid/\"onmouseover=\"window.pwned=1)",
    "![x](https://example.invalid/x.png)",
    "![x\" onerror=\"window.pwned=1](x)",
    "<javascript:window.pwned=1>",
    "[x]( javascript:window.pwned=1)",
    "```html\n<script>window.pwned=1</script>\n```",
    "``` \"onload=window.pwned=1\nx\n```",
    "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| <script>window.pwned=1</script> | c |",
    "> <img src=x onerror=window.pwned=1>\n> - **<svg onload=window.pwned=1>**",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1}",
    "\u202e<script>window.pwned=1</script>\x1b[2J\x00",
    "<object data=https://example.invalid></object>",
    "<embed src=https://example.invalid>",
    "<video src=https://example.invalid autoplay onerror=window.pwned=1></video>",
    "<base href=https://example.invalid>",
    '"><script>window.pwned=1</script>',
    "'><script>window.pwned=1</script>",
    "--><script>window.pwned=1</script>",
    "]]><script>window.pwned=1</script>",
    "</title><script>window.pwned=1</script>",
    "</textarea><script>window.pwned=1</script>",
    "{{constructor.constructor('window.pwned=1')()}}",
    "${window.pwned=1}",
    "javascript:window.pwned=1",
    "data:text/html,<script>window.pwned=1</script>",
    "<math><mtext><style><img src=x onerror=window.pwned=1>",
    "\\u003cscript\\u003ewindow.pwned=1\\u003c/script\\u003e",
    "\u202e<script>window.pwned=1</script>\u2066\u0000\u2028",
]  # fmt: skip
#: what axe-core finds serious or critical
AXE_FAULTS = """
axe.run(document, {resultTypes: ['violations']}).then(({violations}) => violations
  .filter(({impact}) => impact === 'serious' || impact === 'critical')
  .flatMap(({id, nodes}) => nodes.map((one) => `${id}: ${one.html.slice(0, 160)} ${one.failureSummary}`)))
"""


def axe_core() -> str:
    """The program of axe-core; skips where there is none."""
    places = (os.environ.get("MLXLORA_AXE"), ROOT / "node_modules" / "axe-core" / "axe.min.js")
    found = [Path(place) for place in places if place and Path(place).is_file()]
    if not found:
        pytest.skip("needs axe-core: npm install axe-core in the checkout, or MLXLORA_AXE=…/axe.min.js")
    return found[0].read_text("utf-8")
