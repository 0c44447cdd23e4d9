"""Chapter 6: plan.py's formulas against numbers worked out by hand or published, and its predictions against published
runs.
"""
import itertools
import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch

from chapters import expect_error, load_chapter, run_here

chapter = load_chapter("chapter-06-parallelism")
plan = chapter.plan
Layout, MODELS = plan.Layout, plan.MODELS
LLAMA = MODELS["llama-3.1-8b"]
# On Hugging Face: the sum of the shapes in the index of the weights. llm-foundry: the last column of its table, at
# length 2,048.
PARAMETERS = {"llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
              "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
              "smollm-1.7b": 1_711_376_384, "qwen3-0.6b": 596_049_920, "mpt-1b": 1_315_950_592, "mpt-3b": 2_651_837_440,
              "mpt-7b": 6_658_859_008, "mpt-13b": 12_853_954_560, "mpt-30b": 29_975_214_080, "mpt-70b": 64_862_437_376}


@pytest.fixture(scope="module")
def compared():
    return chapter.plan_validation.compare()


def machines(gpus=8, name="h100"):
    return plan.cluster(name, gpus)


def predict(gpus=8, length=8192, model=LLAMA, **layout):
    return plan.predict(model, length, machines(gpus), Layout(**layout))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_published(name):
    assert MODELS[name].parameters(length=2048) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["small", "qwen3-0.6b", "qwen3-8b"])
def test_counts_are_those_of_the_model(name):
    config = chapter.model.CONFIGS[name]
    flops = chapter.flops.step_flops(config, torch.tensor([0, 64, 128], dtype=torch.int32))
    assert MODELS[name].flops(64) * 128 == sum(map(sum, flops.values()))
    assert MODELS[name].parameters() == chapter.flops.num_parameters(config)


def test_flops_by_hand():
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    attention = 12 * 32 * 8192 * 4096
    assert LLAMA.flops(8192) == 6 * (32 * layer + 128256 * 4096) + attention
    assert LLAMA.flops(8192) - LLAMA.flops(8192, causal=True) == attention / 2


def test_products_take_flops_over_the_rate_reached():
    """Two documents of 8,192: six FLOPs for each weight and token, seven halves of half of attention's pairs."""
    weights, tokens = sum(LLAMA.layer_weights().values()), 2 * 8192
    rate = 989e12 * plan.EFFICIENCY["h100", "bf16"]
    flash = 2 * tokens * 8192 * 4096 * 3.5 / (rate / 2)
    for choice, passes, again in (("none", 3, 0), ("selective", 3, 0),
                                  ("full", 4, 2 * tokens * 8192 * 4096 / (rate / 2))):
        products, _ = plan.layer_seconds(LLAMA, 8192, machines(), Layout(micro=2, checkpointing=choice))
        assert products == pytest.approx(2 * passes * tokens * weights / rate + flash + again)


def test_torchtitan_recomputes_every_second_product():
    D, F, kv = 4096, 14336, 1024
    share = plan.recomputed(LLAMA, Layout(checkpointing="every-other"))
    assert share == pytest.approx((D * kv + D * D + D * F) / (2 * D * D + 2 * D * kv + 3 * D * F))   # k, o and up


def test_wires():
    """450 GB/s within a machine, 50 for each GPU between them, of which four fifths are reached."""
    eight = plan.wire(machines(8), 8, 1)
    assert eight == (0.8 * 450e9, 0)
    assert plan.wire(machines(16), 2, 8) == (0.8 * 50e9, 1)          # all that it sends leaves, by its own card
    assert plan.wire(machines(16), 8, 2) == (0.8 * 200e9, 1 / 4)     # four members in a machine: four cards
    assert plan.wire(machines(128), 128, 1) == (0.8 * 400e9, 1 / 8)  # as fast as NVLink, nearly: why FSDP scales


@pytest.mark.parametrize("per_node, gpus, ranks, stride", [
    (6, 24, 4, 1), (6, 24, 2, 2), (6, 6, 4, 1), (8, 24, 3, 1), (8, 40, 5, 1), (4, 16, 8, 1), (4, 16, 2, 2),
    (12, 48, 8, 1), (8, 48, 6, 1),
    (8, 64, 8, 8), (3, 12, 4, 1), (6, 48, 3, 4), (1, 8, 4, 1), (8, 8, 4, 2), (8, 64, 16, 4), (5, 40, 2, 4),
    (6, 36, 9, 4)])
def test_the_group_that_lies_across_machines_is_the_slow_one(per_node, gpus, ranks, stride):
    """Every group counted out: the one with the fewest cards in a machine decides."""
    block = ranks * stride
    groups = [[start + first + i * stride for i in range(ranks)] for start in range(0, gpus, block)
              for first in range(stride)]
    counts = [[[rank // per_node for rank in group].count(machine) for machine in {rank // per_node for rank in group}]
              for group in groups]
    apart = [group for group in counts if len(group) > 1]
    speed, leaving = plan.wire(replace(machines(gpus), per_node=per_node), ranks, stride)
    if not apart:
        assert (speed, leaving) == (0.8 * 450e9, 0)
    else:
        worst = min(min(group) for group in apart)
        assert speed == 0.8 * min(450e9, worst * 50e9)
        assert leaving in [len(group) / ranks for group in apart if min(group) == worst]


def test_tensor_parallel_groups_across_machines_cost_the_network():
    """4 of 6: ranks 4 and 5 are in one machine, 6 and 7 in the next, two cards carry what NVLink carries elsewhere."""
    whole, across = (plan.communication(LLAMA, 8192, replace(machines(24), per_node=n), Layout(dp=6, tp=4))["tp"]
                     for n in (8, 6))
    assert whole[0] == across[0] and whole[2] == 0 and across[2] == 1 / 2
    assert across[1] - whole[1] == pytest.approx(whole[0] / 0.8 * (1 / 100e9 - 1 / 450e9))


def test_bytes_by_hand():
    layer, table, act = LLAMA.layer_parameters(), 128256 * 4096, 2 * 8192 * 4096      # act: 8,192 tokens in bf16
    def send(**layout):
        return {axis: sent[0] for axis, sent in plan.communication(LLAMA, 8192, machines(), Layout(**layout)).items()}
    assert send(dp=8)["dp"] == 2 * 7 / 8 * 4 * (32 * layer + table)                   # all-reduce, float32
    assert send(dp=8, zero=1)["dp"] == 7 / 8 * (4 + 2) * (32 * layer + table)         # reduce-scatter, all-gather
    assert send(dp=8, zero=3, microbatches=5)["dp"] == 5 * 7 / 8 * (4 + 2 + 2) * (32 * layer + table)
    assert send(dp=4, cp=2, zero=3)["dp"] == send(dp=8, zero=3)["dp"]                 # cp sees other tokens too
    assert send(tp=8, microbatches=3)["tp"] == 3 * 7 / 8 * act * (32 * 8 + 4)
    assert send(tp=8, checkpointing="full")["tp"] == 7 / 8 * act * (32 * 12 + 4)
    # Three rounds, k and v of 2,048 tokens.
    assert send(cp=4)["cp"] == 32 * 3 * 3 * 2 * 2 * 2048 * 1024
    assert send(pp=8, microbatches=16, chunks=2)["pp"] == 16 * 2 * 2 * act
    assert not any(send().values())


def test_bytes_within_and_between_machines_add_up():
    layout = Layout(dp=4, cp=2, pp=2, tp=4, zero=1, microbatches=4)
    sent = plan.communication(LLAMA, 8192, machines(64), layout)
    prediction = predict(64, dp=4, cp=2, pp=2, tp=4, zero=1, microbatches=4)
    assert sum(prediction.bytes.values()) == pytest.approx(sum(bytes for bytes, _, _ in sent.values()))
    assert prediction.bytes["inside"] == pytest.approx(sent["tp"][0] + sent["pp"][0])   # 4 x 2 = 8 are one machine


def test_memory_by_hand():
    parameters = 32 * LLAMA.layer_parameters() + 2 * 128256 * 4096
    parts = plan.memory(LLAMA, 8192, machines(1), Layout(checkpointing="full"))
    assert parts["weights"] == 2 * parameters and parts["gradients"] == 4 * parameters
    assert parts["optimizer"] == 12 * parameters
    everything = 4 * 4096 + 3 * 4096 + 3 * 1024 + 4 * 14336
    assert parts["activations"] == 2 * 8192 * (32 * 4096 + everything)
    assert parts["logits"] == 14 * 8192 * 128256


def test_memory_falls_with_each_cut():
    def total(**layout):
        return sum(plan.memory(LLAMA, 8192, machines(64), Layout(**layout)).values())

    assert total(dp=64) > total(dp=64, zero=1) > total(dp=64, zero=2) > total(dp=64, zero=3)
    assert plan.memory(LLAMA, 8192, machines(), Layout(dp=4, cp=2, zero=1))["optimizer"] == \
        plan.memory(LLAMA, 8192, machines(), Layout(dp=8, zero=1))["optimizer"]
    choices = [total(checkpointing=choice) for choice in ("none", "selective", "every-other", "full")]
    assert choices == sorted(choices, reverse=True) and len(set(choices)) == 4
    assert total() > total(cp=2) > total(cp=2, tp=2)
    # A pipeline does not make activations fewer: the first stage holds those of as many microbatches as there are
    # stages.
    flying = plan.memory(LLAMA, 8192, machines(), Layout(pp=8, microbatches=8))["activations"]
    assert flying > 0.99 * 2 * 8192 * 32 * (4 * 4096 + 3 * 4096 + 3 * 1024 + 4 * 14336)


@pytest.mark.parametrize("stages, microbatches, chunks", [(2, 4, 1), (4, 16, 1), (8, 8, 1), (8, 8, 2), (8, 32, 4)])
def test_bubble(stages, microbatches, chunks):
    seconds = predict(pp=stages, microbatches=microbatches, chunks=chunks).seconds
    rest = sum(seconds.values()) - seconds["optimizer"]
    assert seconds["bubble"] / rest == pytest.approx((stages - 1) / (chunks * microbatches + stages - 1))


def test_head_is_on_one_chunk_of_the_last_rank_only():
    """40 layers, a head as heavy as 0.3: however finely interleaved, no rank has more than 11 layers."""
    model = MODELS["llama-2-13b"]
    for chunks in (1, 2, 5, 10):
        layers, most = plan.largest_stage(model, Layout(pp=4, microbatches=32, chunks=chunks), head=0.3)
        assert layers <= 11 and most <= 11, (chunks, layers, most)


def test_communication_hides_only_where_it_can():
    def exposed(gpus=8, **layout):
        return predict(gpus, **layout).seconds["exposed"]

    assert exposed(dp=8, zero=3, micro=2) == 0                          # behind the computation of 16,384 tokens
    assert exposed(16, length=64, dp=16, zero=3) > 0                    # of 64 tokens there is nothing to hide behind
    assert exposed(tp=8) > 7 * exposed(tp=8, hide_tp=True) > 0
    assert predict(dp=8, zero=3).seconds["bubble"] == 0


def test_layouts_fill_the_cluster_and_nothing_else():
    found, reasons = plan.layouts(LLAMA, 8192, 2 ** 20, machines(64))
    assert found and all(layout.dp * layout.cp * layout.pp * layout.tp == 64 for layout in found)
    assert all(layout.dp * layout.micro * layout.microbatches * 8192 == 2 ** 20 for layout in found)
    assert all(layout.pp * layout.chunks <= 32 and layout.tp <= 8 for layout in found)
    assert len(set(found)) == len(found)
    everything = sum(len(plan.divisors(64 // tp // pp)) for tp in plan.divisors(64) for pp in plan.divisors(64 // tp))
    meshes = {(layout.dp, layout.cp, layout.pp, layout.tp) for layout in found}
    assert len(meshes) + sum(reasons.values()) == everything


def test_why_a_mesh_is_not_possible():
    def why(model, *mesh, length=8192, tokens=2 ** 20):
        return plan.illegal(MODELS[model], length, tokens, machines(64), *mesh)

    assert "machine" in why("llama-3.1-8b", 4, 1, 1, 16)
    assert "heads" in why("smollm-1.7b", 21, 1, 1, 3)
    assert "stages" in why("llama-3.1-8b", 1, 1, 64, 1)
    assert why("llama-3.1-8b", 1, 64, 1, 1, length=96, tokens=960) == "length does not divide by 2 cp tp"
    assert why("llama-3.1-8b", 32, 1, 1, 2, length=97, tokens=97 * 32) == "length does not divide by tp"
    assert why("llama-3.1-8b", 32, 1, 2, 1, length=97, tokens=97 * 32) is None   # nobody cuts it
    assert "batch" in why("llama-3.1-8b", 64, 1, 1, 1, tokens=8192 * 63)
    assert why("llama-3.1-8b", 8, 1, 1, 8) is None


def test_plan_is_sorted_and_fits():
    best, reasons = plan.plan(MODELS["llama-3.1-70b"], 8192, 2 ** 20, machines(32))
    speeds = [prediction.tokens_per_second for prediction in best]
    assert speeds == sorted(speeds, reverse=True) and len(best) > 5
    assert all(sum(prediction.memory.values()) <= plan.USABLE * 80e9 for prediction in best)
    assert reasons["memory"] > 0


def test_each_efficiency_is_what_one_published_run_gives():
    rows = [row for row in chapter.plan_validation.PUBLISHED if row["calibrates"]]
    keys = [(plan.SAME_CHIP.get(row["gpu"], row["gpu"]), row["layout"].get("precision", "bf16")) for row in rows]
    assert sorted(keys) == sorted(plan.EFFICIENCY)   # one for each
    for key, row in zip(keys, rows):
        assert chapter.plan_validation.calibrate(row) == pytest.approx(plan.EFFICIENCY[key], abs=1e-4)


def test_published_units():
    """Each way in which sources speak of speed, as tokens/s: by the formula that the source itself gives."""
    validation = chapter.plan_validation
    tokens = {(row["source"], row["name"]): validation.published_tokens(row) for row in validation.PUBLISHED}
    assert tokens["Megatron 2022", "gpt-175b, selective checkpointing"] == 64 * 2048 / 13.75 / 64
    # Megatron 2021, equation 3: 96 B s l h^2 (1 + s / 6h + V / 16lh)
    flops = 96 * 128 * 25600 ** 2 * (1 + 2048 / (6 * 25600) + 51200 / (16 * 128 * 25600))
    assert tokens["Megatron 2021", "gpt-1t, full checkpointing"] == pytest.approx(163e12 / flops)
    # picotron's get_mfu: 6 * all parameters + 12 * layers * width * length
    flops = 6 * 1_711_376_384 + 12 * 24 * 2048 * 2048
    assert tokens["picotron", "smollm-1.7b"] == pytest.approx(0.5 * 989e12 / flops, rel=1e-3)


def test_results_are_what_the_code_computes(compared):
    for name, rows in (("plan_validation", compared), ("plan_summary", chapter.plan_validation.summary(compared))):
        path = chapter.folder / "results" / f"{name}.json"
        assert json.loads(path.read_text())["rows"] == rows, f"run: python {chapter.folder.name}/plan_validation.py"


def test_misses_say_why(compared):
    """Within 15 % of what was published, or a reason why not."""
    off = [row for row in compared if abs(float(row["error"].split()[0])) > 15]
    unsaid = [(row["run"], row["error"]) for row in off if not row["remark"]]
    assert len(off) <= 6 and not unsaid, unsaid
    said = [row for row, source in zip(compared, chapter.plan_validation.PUBLISHED) if source["why"]]
    assert all(row in said for row in off)


def test_table_of_the_best():
    text = run_here(plan, "--model", "llama-3.1-70b", "--gpus", 32, "--batch-tokens", 2 ** 20, "--top", 3)
    rows = [line for line in text.splitlines() if " x " in line]
    assert len(rows) == 3 and "do not: memory" in text
    assert all(math.prod(map(int, row.split()[:4])) == 32 for row in rows)
    slow = run_here(plan, "--gpus", 16, "--between", 1, "--top", 1)
    assert slow != run_here(plan, "--gpus", 16, "--top", 1)   # another cluster, another plan


def test_what_a_message_names_fails_and_what_it_says_would_fit_fits():
    rng, reasons = random.Random(0), {"tp reaches over", "heads or MLP", "fewer layers", "length does", "batch does"}
    asked = 0
    for _ in range(60):
        per_node = rng.choice([1, 2, 6, 8])
        flags = {"--model": rng.choice(["llama-3.1-8b", "smollm-1.7b", "qwen3-0.6b", "gpt-22b"]),
                 "--per-node": per_node,
                 "--gpus": per_node * rng.choice([1, 3, 7, 11, 50]),
                 "--length": (length := rng.choice([1001, 4096, 6000])),
                 "--batch-tokens": length * rng.choice([1, 3, 32]), "--memory": rng.choice([2, 8, 20, 80])}
        told = message(flags)
        if told is None:
            continue
        asked += 1
        if "nothing fits" in told:
            assert not any(reason in told for reason in reasons)
            takes, usable = (float(number.replace(",", ""))
                             for number in re.findall(r"(?:takes|have) ([\d,]+\.\d)", told))
            assert takes > usable
        else:
            named = re.search("is possible, (.*?)(;|$)", told)[1].split(", ")
            _, found = plan.layouts(MODELS[flags["--model"]], length, flags["--batch-tokens"],
                                    plan.cluster("h100", flags["--gpus"], per_node))
            assert named == [f"{number} because {reason}" for reason, number in found.most_common()]
        if remedy := re.search(r"; (--[a-z-]+) (\d+) would fit$", told):
            assert message(flags | {remedy[1]: int(remedy[2])}) is None, (flags, told)
    assert asked > 20


def message(flags):
    """What is wrong with these flags of plan.py, or None."""
    try:
        run_here(plan, *itertools.chain.from_iterable(flags.items()))
    except chapter.cli.InputError as error:
        return str(error)


@pytest.mark.parametrize("flags, words", [
    (("--gpus", 12), ("--gpus 12", "machines of 8")),
    (("--model", "llama-4"), ("llama-4", "llama-3.1-8b")),
    (("--gpu", "v100"), ("v100", "h100")),
    (("--gpu", "a100", "--precision", "fp8"), ("a100", "fp8")),
    (("--model", "llama-3.1-405b"), ("nothing fits", "768.2 GiB", "can have 70.0", "--gpus 128 would fit")),
    (("--memory", 19.5), ("nothing fits", "17.5 GiB", "can have 17.0, 94% of its 18.2", "--gpus 16 would fit")),
    (("--length", 1000, "--batch-tokens", 1500), ("1500", "--length 1000")),
    (("--gpus", 64, "--length", 1001, "--batch-tokens", 1001),
     ("64 GPUs is possible", "length does not divide by tp", "--gpus 32 would fit")),
    (("--gpus", 100_000), ("100000 GPUs is possible", "--gpus 131072 would fit")),
    (("--gpus", 0), ("--gpus",)),
])
def test_bad_input(flags, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan.py", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        plan.run(plan.main)
    expect_error((exit.value.code, *capsys.readouterr()), *words)
