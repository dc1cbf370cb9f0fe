"""The demo's outcome in words, tables and plots."""

import textwrap

from matplotlib.figure import Figure

from obfuscatune.studies.demo.run import Outcome
from obfuscatune.studies.reports.figures import new_figure, style
from obfuscatune.studies.reports.page import Section, figure, page, paragraph, preformatted, table

CLEAR, KEYED, GREY = "#5b6b82", "#c4572b", "#c9d0da"
_LEAKS = "docs/security.md says what each profile leaks."


def warning(outcome: Outcome) -> str:
    """Return what the demo does not show, by the profile."""
    profile = outcome.report.profile
    if not profile.remote:
        return f"Everything ran in one process on this machine, so nothing was protected from its owner. {_LEAKS}"
    if profile.shares:
        return f"All processes ran on this machine, so its owner has all the shares, and with them everything. {_LEAKS}"
    both = "Both processes ran on this machine, so nothing was protected from its owner."
    if profile.keys == "identity":
        return f"{both} This profile has no keys: the worker has the weights in the clear. {_LEAKS}"
    return f"{both} The keys hide coordinates; they are not a cryptographic boundary. {_LEAKS}"


def summary(outcome: Outcome) -> str:
    """Return the outcome as text for a terminal."""
    report = outcome.report
    calls = sum(t.calls for t in report.traffic.values())
    megabytes = sum(t.bytes_sent + t.bytes_received for t in report.traffic.values()) / 1e6
    asked = len(outcome.questions)
    lines = [
        f"accuracy on {asked} questions about the private records (chance 25 %)",
        f"  before                  {outcome.accuracy(outcome.before):6.1%}",
        f"  fine-tuned in the clear {outcome.accuracy(outcome.clear.predicted):6.1%}   {outcome.clear.seconds:6.1f} s",
        f"  fine-tuned protected    {outcome.accuracy(outcome.protected.predicted):6.1%}   "
        f"{outcome.protected.seconds:6.1f} s   {outcome.slowdown:.2f}x",
        f"  different choices on {outcome.different_choices} of {asked} questions, loss curves apart by at most "
        f"{outcome.largest_loss_difference:.1e}",
        "",
        "answers of the protected model",
        *(f"  {prompt} -> {answer}" for prompt, answer in outcome.answers),
        "",
        str(report),
        f"crossed the boundary: {calls:,} calls, {megabytes:,.0f} MB; keying took {outcome.keying_seconds:.1f} s",
        "",
        *textwrap.wrap(warning(outcome), 118),
        f"adapter (PEFT's format): {outcome.adapter}",
    ]
    return "\n".join(lines)


def html_page(outcome: Outcome) -> str:
    """Return the outcome as one self-contained page."""
    report = outcome.report
    asked = len(outcome.questions)
    with style():
        curves, shares = figure(_curves(outcome)), figure(_shares(outcome))
    sections = [
        Section(
            "In the clear and protected",
            paragraph(
                f"The protected model chose differently on {outcome.different_choices} of {asked} questions; its loss "
                f"curve is apart from the one in the clear by at most {outcome.largest_loss_difference:.1e}."
            )
            + curves,
        ),
        Section("What was where", paragraph(f"Worker: {report.worker}.") + shares),
        Section(
            "What crossed the boundary",
            table(
                ("request", "calls", "MB sent", "MB received", "seconds waiting"),
                [
                    (op, t.calls, t.bytes_sent / 1e6, t.bytes_received / 1e6, t.seconds)
                    for op, t in report.traffic.items()
                ],
            ),
        ),
        Section(
            "What it cost",
            table(
                ("", "seconds"),
                [
                    ("keying and shipping the weights, start of the worker included", outcome.keying_seconds),
                    (f"fine-tuning in the clear, {outcome.settings.max_steps} steps", outcome.clear.seconds),
                    ("fine-tuning, protected", outcome.protected.seconds),
                ],
            )
            + paragraph(f"Slowdown {outcome.slowdown:.2f}x at this small size; obfuscatune bench measures true sizes."),
        ),
        Section(
            "Answers of the protected model",
            table(("prompt", "completion"), outcome.answers),
        ),
        Section("What this does not show", paragraph(warning(outcome), note=True)),
        Section("Report", preformatted(str(report))),
    ]
    return page(f"obfuscatune demo: profile {report.profile.name}", sections)


def _curves(outcome: Outcome) -> Figure:
    plot = new_figure(9, 3.2)
    left, right = plot.subplots(1, 2, width_ratios=(2, 1))
    left.plot(outcome.clear.losses, color=CLEAR, linewidth=3, alpha=0.5, label="in the clear")
    left.plot(outcome.protected.losses, color=KEYED, linewidth=1, label="protected")
    left.set(xlabel="step", ylabel="loss", title="Fine-tuning loss")
    left.legend()
    names = ("before", "clear", "protected")
    runs = (outcome.before, outcome.clear.predicted, outcome.protected.predicted)
    shares = [100 * outcome.accuracy(predicted) for predicted in runs]
    bars = right.bar(names, shares, color=(GREY, CLEAR, KEYED))
    right.bar_label(bars, fmt="%.0f %%")
    right.axhline(25, color="black", linewidth=0.8, linestyle=":")
    right.set(ylim=(0, 110), ylabel="%", title="Accuracy (dotted: chance)")
    return plot


def _shares(outcome: Outcome) -> Figure:
    report = outcome.report
    plot = new_figure(9, 1.6)
    axis = plot.subplots()
    inside, outside = 100 * report.enclave_share, 100 * report.worker_parameters / report.total_parameters
    axis.barh(("parameters",), (inside,), color=CLEAR, label=f"enclave, in the clear: {inside:.1f} %")
    axis.barh(("parameters",), (outside,), left=(inside,), color=KEYED, label=f"worker: {outside:.1f} %")
    axis.set(xlabel="% of the model's parameters", xlim=(0, 101))
    plot.legend(loc="outside upper center", ncols=2)
    return plot
