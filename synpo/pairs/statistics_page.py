"""The statistics of a build as one HTML page: no script, no network, light and dark."""

from collections.abc import Mapping
from typing import Any

import jinja2

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Preference pairs: {{ s.pairs }} from {{ s.videos }} videos</title>
<style>
:root { color-scheme: light dark; --bar: light-dark(#0072b2, #56b4e9); --line: light-dark(#ccc, #444); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #16181b); color: light-dark(#1a1a1a, #e6e6e6); }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1.5rem }
.row { display: grid; grid-template-columns: 4.5rem 1fr 4rem; gap: .5rem; align-items: center; font-size: .85rem }
.row span:first-child, .row span:last-child { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: var(--bar); height: .8rem; min-width: 1px } h3 { font-size: .95rem; margin: .5rem 0 }
details { font-size: .9rem } li { overflow-wrap: anywhere } code { overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>{{ s.pairs }} preference pairs from {{ s.videos }} videos</h1>

<h2>Where videos and pairs were lost</h2>
<table>
<tr><th>reason</th><th class="n">videos</th></tr>
{%- for reason, lost in s.lost.items() %}
<tr><td>{{ reason }}</td><td class="n">{{ lost.count }}</td></tr>
{%- endfor %}
<tr><th>pairs written</th><th class="n">{{ s.pairs }}</th></tr>
</table>
{%- for reason, lost in s.lost.items() if lost.first %}
<details><summary>{{ reason }}: which</summary><ul>
{%- for name in lost.first %}<li>{{ name }}</li>{% endfor %}
{%- if lost.count > lost.first|length %}<li>and {{ lost.count - lost.first|length }} more</li>{% endif %}
</ul></details>
{%- endfor %}

<h2>Scores</h2>
<div class="charts">
{%- for title, histogram in charts %}
<div><h3>{{ title }}</h3>
{%- for value, count, share in histogram %}
<div class="row"><span>{{ value }}</span><div class="bar" style="width: {{ share }}%"></div>
<span>{{ count }}</span></div>
{%- else %}<p>none</p>{% endfor %}
</div>
{%- endfor %}
</div>

<h2>Length</h2>
<table>
<tr><th>pairs</th><th class="n">number</th><th class="n">chosen longer</th><th class="n">chosen shorter</th>
<th class="n">mean characters, chosen</th><th class="n">rejected</th></tr>
{%- for name, bias in s.lengths.items() %}
<tr><td>{{ name }}</td><td class="n">{{ bias.pairs }}</td>
{%- if bias.pairs %}<td class="n">{{ "%.1f"|format(100 * bias.chosen_longer) }} %</td>
<td class="n">{{ "%.1f"|format(100 * bias.chosen_shorter) }} %</td><td class="n">{{ bias.mean_chosen }}</td>
<td class="n">{{ bias.mean_rejected }}</td>{% endif %}</tr>
{%- endfor %}
</table>
<p>Correlation of a candidate's total score with its length: {{ s.correlation_of_total_and_length|shown }}.</p>

<h2>Judge</h2>
<table>
<tr><th>criterion</th><th class="n">pairs of votes</th><th class="n">equal</th><th class="n">mean distance</th></tr>
{%- for name, votes in s.agreement_of_votes.items() %}
<tr><td>{{ name }}</td><td class="n">{{ votes.pairs_of_votes }}</td>
<td class="n">{{ votes.equal|shown }}</td><td class="n">{{ votes.mean_distance|shown }}</td></tr>
{%- endfor %}
</table>
<table>
<tr><th>criteria</th><th class="n">correlation</th></tr>
{%- for names, value in s.correlation_of_criteria.items() %}
<tr><td>{{ names }}</td><td class="n">{{ value|shown }}</td></tr>
{%- endfor %}
</table>
{%- if s.judge_problems %}
<table>
<tr><th>replies without a usable score, and failed requests</th><th class="n">number</th></tr>
{%- for kind, count in s.judge_problems.items() %}
<tr><td>{{ kind }}</td><td class="n">{{ count }}</td></tr>
{%- endfor %}
</table>
{%- endif %}
{%- if s.cost %}<p>All answers: {{ s.cost.tokens_read }} tokens read, {{ s.cost.tokens_written }} written
{%- if s.cost.cost %}; cost {{ "%.4f"|format(s.cost.cost) }}{% endif %}.</p>{% endif %}

<h2>Settings</h2>
<table>
{%- for name, value in s.settings.items() %}
<tr><td>{{ name }}</td><td><code>{{ value|tojson }}</code></td></tr>
{%- endfor %}
</table>
</body>
</html>
"""


def page(summary: Mapping[str, Any]) -> str:
    """The page for a summary of `Statistics`, with `settings`, and where there is one `judge_problems` and `cost`."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    environment.filters["shown"] = lambda value: "-" if value is None or value == "" else str(value)
    histograms = {
        **{f"{name}": counts for name, counts in summary["scores"].items()},
        "weighted total": summary["totals"],
        "gap between best and worst": summary["gaps"],
    }
    charts = [(title, _bars(counts)) for title, counts in histograms.items()]
    return environment.from_string(_TEMPLATE).render(s=summary, charts=charts)


def _bars(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """(value, count, width in per cent of the longest bar)."""
    most = max(counts.values(), default=0)
    return [(value, count, round(100 * count / most, 1)) for value, count in counts.items()]
