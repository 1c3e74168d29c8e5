"""The report: pictures are drawn of what results.json says, and a coloured text is the text, every character of it."""

import base64
import html
import json
import math
import re
import struct
import sys

import conftest
import pytest
import reference
import torch
from conftest import tiny_dense, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.observe import consistency, mixture_consistency
from dynamoe_hf.plots import draw_experts, draw_frontier, draw_tokens
from dynamoe_hf.report import report_folder, token_difficulty, tokens_page
from dynamoe_hf.tables import demo_table, evaluation_table, join_records, ratio_text, text_name


NASTY = "Price: $5 and $6 <script>alert('x')</script> &amp; “naïve” 🙂👩‍👧 東京\n\n\tdef f(x):  # ok\n" + "long" * 40


def tiny_dynamoe(**settings):
    """A tiny DynaMoE whose routers disagree from token to token."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense(num_hidden_layers=3, vocab_size=300), **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router.output." in name:
                parameter.normal_(std=3.0)
    return model


def byte_tokenizer():
    """Byte-level, as of Llama and Qwen, without a merge: every character that is not ASCII is cut into several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def evaluation(share, text="held-out", dense=14.0, **fields):
    """A plausible entry of results.json."""

    def point(ratio):
        bounds = {
            "perplexity_interval": [dense * ratio * 0.9, dense * ratio * 1.1],
            "ratio_interval": [ratio - 0.1, ratio + 0.1],
        }
        return {"perplexity": dense * ratio, "ratio_to_dense": ratio, "mean_share": share, **bounds}

    spared = 1 - share
    return {
        "setting": f"budget {share:g}", "sensitivity": share, "text": text, "tokens": 4088, **point(1 + spared),
        "active_parameters": 100_000, "total_parameters": 150_000, "expert_use": [[0.1, 0.2, 0.3, 0.4]] * 3,
        "router_agreement": 0.7, "dense_perplexity": dense,
        "baselines": {"static": point(1 + 3 * spared), "random": point(1 + 2 * spared), "label": point(1 + spared / 2)},
        **fields,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A model folder with results, as `dynamoe evaluate` leaves it."""
    path = tmp_path / "tiny-dynamoe"
    tiny_dynamoe(budgets={"0.5": 0.3, "0.75": 0.6}).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    entries = [evaluation(share, text) for text in ("held-out", ["books/a.txt", "<b>.txt"]) for share in (0.9, 0.5, 0.75)]
    (path / "results.json").write_text(json.dumps({"evaluations": entries}))
    return path


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82"), f"{path} is no whole PNG"
    return struct.unpack(">II", content[16:24])


def shown_text(page):
    """What a browser shows of the coloured text: tags dropped, then entities read."""
    inside = re.search(r'<div id="text"[^>]*>(.*?)</div>', page, re.DOTALL)[1]
    return html.unescape(re.sub(r"<[^>]*>", "", inside))


def test_report_of_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    text = tmp_path / "nasty.txt"
    text.write_text(NASTY, encoding="utf-8")
    paths = report_folder(folder, text=text, budget=0.5)
    assert [path.name for path in paths] == ["frontier.png", "experts.png", "tokens.png", "tokens.html", "index.html"]
    assert {path.parent for path in paths} == {folder / "report"}
    for path in paths[:3]:
        width, height = png_size(path)
        assert width == 1800 and 400 < height < 2400, f"{path.name} is {width} x {height}"
    assert "matplotlib.pyplot" not in sys.modules, "the caller's figures and back-end are not ours"
    tokens, index = (path.read_text(encoding="utf-8") for path in paths[3:])
    assert shown_text(tokens) == NASTY
    for page in (tokens, index):
        assert not re.search(r"https?://|<link|@import|\bsrc=(?!\"data:)", page), "a page must not load anything"
        assert "<script>alert" not in page and "<b>.txt" not in page
    inlined = [base64.b64decode(image) for image in re.findall(r'src="data:image/png;base64,([^"]+)"', index)]
    assert inlined == [path.read_bytes() for path in paths[:3]]
    for wanted in ("budget 0.75", "one width for all tokens", "21.00", "1.500×", "loss_weighted", "a.txt, &lt;b&gt;.txt"):
        assert wanted in index, wanted
    assert report_folder(folder, out=tmp_path / "other")[0] == tmp_path / "other" / "frontier.png"  # the default text


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, tiny_tokenizer])
def test_token_difficulty(tokenizer):
    model, tokenizer, text = tiny_dynamoe(), tokenizer(), "A <b> of 5 $\n\nand"
    tokens, shares = token_difficulty(model, tokenizer, text, 0.5)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    experts = model(ids, sensitivity=0.5, output_router_logits=True).expert_indices
    expected = [[(expert + 1) / 4 for expert in layer[0].tolist()] for layer in experts]
    assert shares.tolist() == expected and shares.unique().numel() > 2, "the routers must be mixed, or this proves nothing"
    assert tokens == [tokenizer.decode([i]) for i in ids[0].tolist()] == list(text)
    assert token_difficulty(model, tokenizer, text)[1].unique().tolist() == [1.0]  # the config says 1: the dense model


def test_characters_of_several_tokens_stay_whole():
    tokens, shares = token_difficulty(tiny_dynamoe(), byte_tokenizer(), NASTY, 0.5)
    assert "".join(tokens) == NASTY and len(tokens) == shares.shape[1] == len(NASTY.encode())
    start = tokens.index("🙂")
    assert tokens[start : start + 5] == ["🙂", "", "", "", "👩"]


def test_consistency_equals_the_plain_loops():
    generator = torch.Generator().manual_seed(0)
    taken = torch.rand(30, 12, generator=generator) < torch.linspace(0.05, 0.7, 12)
    found, (performance, hits) = consistency(taken[None], 4), reference.consistency(taken, 4, 2)
    assert found.performance == pytest.approx(performance) and found.hits == pytest.approx(hits)
    assert 0 < hits < 1 and 0 < performance < 1
    always = torch.zeros(2, 30, 12, dtype=torch.bool)
    assert consistency(always, 4) is None and consistency(taken[None, :3], 4) is None
    always[..., 3] = True
    assert consistency(always, 4) == (1, 1)
    two = torch.cat([taken[None], always[:1]])
    assert consistency(two, 30).performance > consistency(taken[None], 30).performance, "a segment within one sequence alone"


def test_routes_of_a_mixture(folder, tmp_path):
    model = conftest.tiny_dynamoe("deepseek_v3", expert_widths=[0, 0.25, 0.5, 1])
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    found = mixture_consistency(model, ids, 8, sensitivity=0.5)
    assert list(found) == [1], "the first layer is dense"
    with model.routing(sensitivity=0.5, records=[]) as routing:
        model(ids)
    record = routing.records[1]
    experts, rings = torch.zeros(2, 40, 4), torch.zeros(2, 40, 12)
    for place in torch.cartesian_prod(*map(torch.arange, record.index.shape)).tolist():
        number, width = int(record.index[tuple(place)]), int(record.expert[tuple(place)])
        experts[place[0], place[1], number] = 1
        rings[place[0], place[1], 3 * number : 3 * number + width] = 1
    assert found[1] == (consistency(experts.bool(), 8), consistency(rings.bool(), 8))
    assert found[1][0] != found[1][1]


def test_report_of_a_mixture_says_what_routing_looks_like(folder, tmp_path):
    assert "What routing looks like" not in report_folder(folder)[-1].read_text()
    mixture = tmp_path / "mixture"
    conftest.tiny_dynamoe(
        "qwen3_moe", dense_settings={"num_hidden_layers": 3}, budgets={"0.5": 0.3, "0.75": 0.6}
    ).save_pretrained(mixture)
    tiny_tokenizer().save_pretrained(mixture)
    (mixture / "results.json").write_text((folder / "results.json").read_text())
    index = report_folder(mixture)[-1].read_text()
    (table,) = re.findall(r"<caption>How alike 16 tokens.*?</table>", index, re.DOTALL)
    numbers = [float(number) for number in re.findall(r"<td>([\d.]+)%</td>", table)]
    assert len(numbers) == 3 * 4 and all(0 < number <= 100 for number in numbers)
    short = tmp_path / "short.txt"
    short.write_text("few tokens")
    assert "not measured" in report_folder(mixture, text=short)[-1].read_text()


def test_page_holds_the_exact_numbers():
    shares = torch.tensor([[0.25, 1.0, 0.5], [0.25, 0.5, 1.0]])
    page = tokens_page(["a", "\n", "<"], shares.mean(0), dict(zip("01", shares)), "budget 0.5")
    assert "const rows = [[250,750,750],[250,1000,500],[250,500,1000]]" in page
    titles = re.findall(r'title="([^"]+)"', page)
    assert titles[1] == "75.0% of the MLPs' weights, mean over all layers (50% to 100%)"
    assert shown_text(page) == "a\n<"
    # The colour is the mean: lightest for the easiest token, the same for equal means.
    assert re.findall(r"--share:([\d.]+)", page) == ["0.000", "1.000", "1.000"]


def test_hostile_text_is_escaped(folder, tmp_path):
    """A token, a setting, a text's name or a folder's name can look like HTML, and none of them becomes an element."""
    pieces = ["</script>", "<script>alert(1)</script>", '" onfocus="alert(1)', "</div>", "{{ 7 * 7 }}", "&lt;"]
    page = tokens_page(pieces, torch.rand(6), {"0": torch.rand(6)}, "<img src=x>")
    assert page.count("<script>") == page.count("</script>") == page.count("</div>") - 2 == 1
    assert "<img" not in page and "&lt;img src=x&gt;" in page
    assert page.count("onfocus=") == page.count("&#34; onfocus=&#34;") == 1
    assert shown_text(page) == "".join(pieces)
    entry = evaluation(0.5, "</title><script>", setting="<b>bold</b>", baselines={"</tr>": evaluation(0.5)})
    (folder / "results.json").write_text(json.dumps({"evaluations": [entry]}))
    hostile = folder.rename(tmp_path / "<script>")
    index = report_folder(hostile)[-1].read_text(encoding="utf-8")
    assert "<script>" not in index and "<b>" not in index
    assert "<title>&lt;script&gt;: report</title>" in index and "<td>&lt;b&gt;bold&lt;/b&gt;</td>" in index


def test_evaluation_table():
    """What `dynamoe evaluate` prints, character by character."""
    plain = {"perplexity": 3.0, "mean_share": 0.5}
    tasks = {"arc_easy": {"acc,none": 0.3141, "acc_stderr,none": 0.01, "sample_len": 100}}
    entries = [
        evaluation(0.5, tasks=tasks),
        evaluation(
            0.25, setting="expert 0", router_agreement=None, active_parameters=123_456_789, baselines={"static": plain}
        ),
    ]
    del entries[1]["ratio_to_dense"]
    assert evaluation_table(entries).splitlines() == [
        "setting              MLP share  width    active           perplexity (95%)           to dense (95%) agreement",
        "budget 0.5               50.0%  50.0%     0.1 M    21.00 (18.90 to 23.10)   1.500 (1.400 to 1.600)       70%",
        "  static                 50.0%                     35.00   ratio 2.500",
        "  random                 50.0%                     28.00   ratio 2.000",
        "  label                  50.0%                     17.50   ratio 1.250",
        "  arc_easy: acc,none 0.3141, acc_stderr,none 0.01, sample_len 100",
        "expert 0                 25.0%  25.0%   123.5 M    24.50 (22.05 to 26.95)             not measured          ",
        "  static                 50.0%                      3.00   ratio nan",
    ]


def test_demo_table():
    """What `dynamoe demo` prints, character by character."""
    more = {"tokens_per_second": 9.74, "speed_ratio": 1.234}
    rows = [
        {"budget": 0.5, **evaluation(0.5), **more, "baseline_ratios": {"static": 2.5, "random": 2.0}},
        {"budget": 1.0, **evaluation(1.0), **more, "baseline_ratios": {}},
    ]
    assert demo_table(rows).splitlines() == [
        "",
        "Dense perplexity on held-out topics: 14.00 (4,088 tokens)",
        "",
        "| budget | mean MLP share | active parameters | perplexity | ratio to dense (95%) | static prefix | random routes "
        "| tokens/s, int8 | to dense |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 50% | 50.0% | 0.1 M | 21.00 | 1.500 (1.400 to 1.600) | 2.500 | 2.000 | 9.7 | 1.23x |",
        "| 100% | 100.0% | 0.1 M | 14.00 | 1.000 (0.900 to 1.100) |  |  | 9.7 | 1.23x |",
    ]


def test_rows_join_evaluations_budgets_and_timings():
    """A budget is found by its sensitivity, not by the name of the setting; a timing by the setting, at a batch of one."""
    timings = [{"setting": "budget 0.75", "batch": batch, "ratio": batch} for batch in (8, 1)]
    evaluations = [evaluation(0.75, sensitivity=0.6), evaluation(0.5, sensitivity=0.31)]
    rows = join_records(evaluations, {"0.5": 0.3, "0.8": 0.6 * (1 + 1e-12)}, {"decode": timings})
    assert [(row["setting"], row["budget"]) for row in rows] == [
        ("budget 0.75", 0.8),
        ("budget 0.5", None),
        ("budget 0.5", 0.5),
    ]
    assert [row["decode"].get("ratio") for row in rows] == [1, None, None]
    assert all(row["prefill"] == {} and row["tasks"] == {} for row in rows)
    assert ratio_text(rows[0]) == "1.250 (1.150 to 1.350)" and ratio_text(rows[2]) == "not measured"
    assert ratio_text({"ratio_to_dense": 1.0, "ratio_interval": [math.nan, math.nan]}) == "1.000"
    assert text_name(["/home/a/b.txt", "c.txt"]) == "b.txt, c.txt" and text_name("./runs/base") == "base"


def test_frontier_falls_back_to_perplexity():
    """Ratios only where every point has one; a single block has no interval, and a forced expert is one width for all."""
    entries = [evaluation(0.5), evaluation(0.75, baselines={}, perplexity_interval=[math.nan, math.nan])]
    del entries[1]["ratio_to_dense"]
    forced = evaluation(0.25, setting="expert 0", baselines={})
    del forced["sensitivity"]
    axis = draw_frontier([*entries, forced]).axes[0]
    points = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axis.lines if line.get_marker() in "os"}
    assert points == {(50.0, 75.0): (21.0, 17.5), (25.0, 50.0): (24.5, 35.0)}
    assert any(list(line.get_ydata()) == [14.0, 14.0] for line in axis.lines), "the dense model is drawn"
    assert "50% of the MLPs' weights gives 21.00 perplexity" in " ".join(axis.texts[-1].get_text().split())


@pytest.mark.parametrize("experts", [4, 8])
def test_heat_map_stays_legible(experts):
    """With as many experts as conversion makes, neither the numbers of a row nor the widths below it run into each other."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    uses = [[[0.88, *[0.12] * (experts - 1)]] * 30, [[1.0, *[0.0] * (experts - 1)]] * 30] * 2
    entries = [evaluation(share, expert_use=use) for share, use in zip((0.5, 0.6, 0.75, 0.9), uses)]
    figure = draw_experts(entries, torch.arange(1, experts + 1).div(experts).expand(30, experts), [*map(str, range(30))])
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    for axis in figure.axes:
        for row in (axis.get_xticklabels(), axis.texts[:experts]):
            boxes = [text.get_window_extent(canvas.get_renderer()) for text in row]
            assert len(boxes) > 1 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
        assert axis.get_xticklabels()[-1].get_text() == "100%"


def test_long_text_stays_a_picture():
    figure = draw_tokens(["\n"] * 3000 + ["end"], torch.rand(3001), "budget 0.5")
    assert figure.get_size_inches()[1] < 15


def test_errors(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"outside the calibrated range 0\.5 to 1"):
        report_folder(folder, budget=0.2)
    with pytest.raises(ValueError, match=r"The text has no tokens: found ''"):
        token_difficulty(tiny_dynamoe(), tiny_tokenizer(), "")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match=r"pip install 'dynamoe_hf\[report\]'"):
            report_folder(folder)
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match=r"nothing to draw.*results\.json.*Run `dynamoe evaluate "):
        report_folder(folder)
    assert not (folder / "report").exists(), "a report that fails leaves nothing"
