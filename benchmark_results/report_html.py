"""report.html for `report.py --html`: README's part, REPORT.md, lessons and films in one file, with charts for plots.

It needs neither a server nor a network: pictures are inside, and Vega-Lite comes from a package.
"""
import base64
import json
import mimetypes
import re
from pathlib import Path

import altair as alt
import numpy as np
from markdown_it import MarkdownIt
from vl_convert import javascript_bundle

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Offline RL: results</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 1000px; margin: auto; padding: 0 12px; overflow-wrap: break-word }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; font-size: 14px; margin: 1em 0 }}
th, td {{ border: 1px solid #ccc; padding: 3px 8px; overflow-wrap: normal }} td code {{ white-space: nowrap }}
img {{ max-width: 100% }} .chart {{ display: block; width: 100% }}
</style><script>{script}</script>
<a href="#results">Results</a> · <a href="#runs">Runs and curves</a> · <a href="#lessons">Lessons</a> ·
<a href="#films">Films</a>
<section id="results"><h1>Offline RL, one file per method: results</h1>{results}</section>
<section id="runs">{runs}</section><section id="lessons">{lessons}</section>
<section id="films"><h1>Films</h1>{films}</section>
<script>
for (const [id, spec] of Object.entries({charts})) vegaEmbed("#" + id, spec, {{actions: false}});
</script></html>
"""


def chart(inside, mean, shown):
    """The curves of a dataset; a click on the legend switches a line."""
    points = [{"method": cell.name, "x": int(x), "mean": y, "low": low, "high": high} for cell in inside
              for x, y, low, high in zip(cell.updates, *np.round([cell.curve, *cell.range], 2).tolist())]
    first = [cell.name for cell in inside if cell.label in shown] or [cell.name for cell in inside]
    on = alt.selection_point(name="on", fields=["method"], bind="legend", toggle="true", empty=False,
                             value=[{"method": name} for name in first])
    names = dict.fromkeys([*first, *(cell.name for cell in inside)])  # colours repeat after ten
    scale = alt.Scale(domain=[*names], scheme="tableau10")
    legend = alt.Legend(orient="bottom", direction="horizontal", columns=3, symbolType="stroke", symbolStrokeWidth=4)
    base = alt.Chart(alt.Data(values=points)).transform_filter(on).encode(x=alt.X("x:Q", title=inside[0].unit))
    lines = base.mark_line(point=True).encode(
        y=alt.Y("mean:Q", title="normalised score" if inside[0].scored else "return"),
        color=alt.Color("method:N", title="click: a line on or off", scale=scale, legend=legend),
        opacity=alt.condition(on, alt.value(1), alt.value(0.25)),
        tooltip=["method:N", "x:Q", "mean:Q", "low:Q", "high:Q"])
    bands = base.mark_area(opacity=0.15).encode(
        y="low:Q", y2="high:Q", color=alt.Color("method:N", scale=scale, legend=None))
    data = alt.Chart(alt.Data(values=[{"mean": mean}] * bool(np.isfinite(mean))))
    data = data.mark_rule(strokeDash=[2, 3]).encode(y="mean:Q")
    layers = alt.layer(bands, lines.add_params(on), data).resolve_scale(color="independent")  # the legend is the lines'
    return layers.properties(width="container", height=360).to_dict()


def write(root, curves):
    """`curves`: {name of a plot: cells, mean of the data, labels that are on at first}."""
    folder = root / "benchmark_results"
    charts = {"chart-" + name.replace(".", "-"): chart(*own) for name, own in curves.items()}

    def put(base, image):
        """A chart for a plot of curves; other pictures with their bytes."""
        path, name = base / image[1], "chart-" + Path(image[1]).stem.replace(".", "-")
        if name in charts:
            return f'<div class="chart" id="{name}"></div>'
        if not path.exists():
            return f"<em>{path.name} is not there</em>"
        inside = base64.b64encode(path.read_bytes()).decode()
        return f'<img src="data:{mimetypes.guess_type(path)[0]};base64,{inside}" alt="{image[2]}">'

    def render(text, base):
        text = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        return re.sub(r'<img src="([^"]+)" alt="([^"]*)" />', lambda image: put(base, image), text)

    readme, lessons = (root / "README.md").read_text(), folder / "lessons" / "README.md"
    part = re.search("<!-- results: begin -->(.*)<!-- results: end -->", readme, re.S)[1]
    films = [f"![{said}]({path})\n\n{said}" for said, path in re.findall(r"!\[(.*?)\]\((\S+\.gif)\)", readme)]
    (folder / "report.html").write_text(PAGE.format(
        script=javascript_bundle(vl_version=alt.VEGALITE_VERSION.rpartition(".")[0]),
        charts=json.dumps(charts).replace("</", "<\\/"), results=render(part, root),
        runs=render((folder / "REPORT.md").read_text(), folder),
        lessons=render(lessons.read_text() if lessons.exists() else "", lessons.parent),
        films=render("\n\n".join(films), root)))
