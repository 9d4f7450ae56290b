"""Where the numbers come from, and the commands that give this run again."""

from typing import Any

from pipeline.core.runtime import as_json
from pipeline.reporting.inputs import SPLITS
from pipeline.reporting.provenance import provenance
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base


class Section(Base[dict[str, Any]]):
    """Code, params, data, machine."""

    title = "Provenance"
    place = 100
    template = """\
<dl class="facts">
<dt>Code</dt><dd>{% if code.revision %}<code>{{ code.revision }}</code> of {{ code.date }}{% if code.dirty %},
<span class="differs">with uncommitted changes</span> to {{ code.changed_files[:8] | join(", ") }}\
{% if code.changed_files | length > 8 %} and {{ code.changed_files | length - 8 }} more{% endif %}{% else %},
clean{% endif %}{% else %}not a git checkout{% endif %}</dd>
<dt>params.yaml</dt><dd>sha256 <code>{{ params.sha256 }}</code>{% if params.profile %} (the settings of
<code>profiles/{{ params.profile }}.yaml</code>){% endif %}</dd>
<dt>Data</dt><dd>{% if data_sha256 %}sha256 of the manifests <code>{{ data_sha256 }}</code>{% else %}no manifests\
{% endif %}</dd>
<dt>Machine</dt><dd>{{ hardware.cpu }}, {{ hardware.cores }} cores, {{ hardware.memory_gb }} GB\
{% for gpu in hardware.gpus %}; {{ gpu }}{% else %}; no GPU{% endfor %} ({{ hardware.system }})\
{% if training_threads %}; trainings on {{ training_threads | join(" or ") }}
thread{{ "" if training_threads == [1] else "s" }}{% endif %}</dd>
<dt>Versions</dt><dd>{% for name, version in versions.items() %}{{ name }} {{ version }}{% if not loop.last %},
{% endif %}{% endfor %}</dd>
</dl>
<h3>Run it again</h3>
<pre>{{ commands }}</pre>"""

    def read(self, run: Run) -> dict[str, Any]:
        """Look at the checkout, the manifests and the machine."""
        p = run.places
        manifests = [p.clips / split / "manifest.csv" for split in SPLITS]
        trainings = [taken for stage, taken in run.timings.items() if stage.startswith("train_")]
        threads = [int(taken["threads"]) for taken in trainings if "threads" in taken]
        return provenance(p.root, p.params, manifests, threads)

    def files(self, data: dict[str, Any], metrics: Metrics) -> dict[str, str | bytes]:
        """All of it, for programs."""
        return {"provenance.json": as_json(data)}

    def context(self, data: dict[str, Any], metrics: Metrics) -> dict[str, Any]:
        """All of it, and the commands."""
        return {**data, "commands": rerun(data)}


def rerun(known: dict[str, Any]) -> str:
    """The commands that give this run again."""
    code, params = known["code"], known["params"]
    lines = [f"git checkout {code['revision']}"] if code["revision"] else []
    threads = known["training_threads"]
    one = f"OMP_NUM_THREADS={threads[0]} " if len(threads) == 1 and not known["hardware"]["gpus"] else ""
    if params["profile"]:
        lines.append(f"make profile NAME={params['profile']}")
    elif "params.yaml" in code["changed_files"]:
        lines.append(f"# params.yaml had changes of its own: sha256 {params['sha256']}")
    return "\n".join([*lines, f"{one}make repro", "make gate"])
