"""The frame of HTML pages that need nothing but themselves: no script, no network, light and dark, wide and narrow."""

from typing import Any

import jinja2

_FRAME = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{% block title %}{% endblock %}</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d4d4d4, #3d4148); --soft: light-dark(#5a5a5a, #a5a9b0);
  --band: light-dark(#f4f6f8, #1f2329) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem;
  background: light-dark(#fff, #16181c); color: light-dark(#1a1a1a, #e6e6e6) }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin-top: 2.2rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere }
.note { color: var(--soft); margin: .3rem 0; font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
td:first-child, th:first-child { padding-left: .5rem }
th { font-weight: 600 } td.n, th.n { text-align: right; white-space: nowrap }
table + table { margin-top: .8rem }
thead th { border-bottom: 1px solid var(--line) } tbody tr:nth-child(odd) { background: var(--band) }
code { overflow-wrap: anywhere }
@media (max-width: 40rem) {
  body { padding: 0 .7rem } table { font-size: .8rem } td, th { padding-right: .35rem }
  td:first-child, th:first-child { padding-left: .2rem }
}
{% block style %}{% endblock %}
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""


def page(template: str, **values: Any) -> str:
    """The page of a Jinja template that begins with `{% extends "frame" %}` and fills the blocks title, style and body.

    Values are escaped. Errors: jinja2.UndefinedError for a value that the template uses and that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"frame": _FRAME}), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.from_string(template).render(values)
