"""Reading YAML: extends, overrides, and errors that fit on one line and name file, key, value and rule."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cosmos_scale.config import RetrievalConfig, RunConfig
from cosmos_scale.config.keys import nearest_key, valid_keys
from cosmos_scale.config.load import dump_config, load_config, make_config
from cosmos_scale.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base = tmp_path / "shared" / "base.yaml"
    base.parent.mkdir()
    base.write_text("train: {epochs: 4, global_batch: 64}\noptimizer: {lr: 1e-3}\n")
    (tmp_path / "shared" / "views.yaml").write_text(
        "extends: base.yaml\ndata:\n  views: {flip: 0.1}\n  sources:\n"
        "    - {name: a, shards: x}\n    - {name: b, shards: y}\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text("extends: [shared/base.yaml, shared/views.yaml]\nname: tiny\ntrain: {global_batch: 8}\n")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def refused_text(tmp_path: Path, text: str) -> str:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    return refusal(path)


def test_extends_merges_bases_first_then_own_keys(run: Path) -> None:
    config = load_config(run)
    assert (config.name, config.train.epochs, config.train.global_batch) == ("tiny", 4, 8)
    assert config.optimizer.lr == 1e-3
    assert config.data.views.flip == 0.1
    assert [source.name for source in config.data.sources] == ["a", "b"]


def test_a_file_means_the_same_bases_by_whichever_link_it_is_read(run: Path) -> None:
    link = run.parent / "links" / "mine.yaml"
    (link.parent / "shared").mkdir(parents=True)
    (link.parent / "shared" / "base.yaml").write_text("train: {epochs: 9}\n")
    link.symlink_to("../run.yaml")
    assert load_config(link) == load_config(run)


def test_overrides_win_and_reach_into_lists_and_unset_sections(run: Path) -> None:
    config = load_config(
        run,
        [
            "train.epochs=5",
            "data.sources.1.shards=/data/b",
            "eval.retrieval.shards=held",
            "data.views={flip: 0.2}",
            "optimizer.betas=[0.8, 0.9]",
            "train.max_steps=null",
            "output=a=b",
        ],
    )
    assert config.train.epochs == 5
    assert [source.shards for source in config.data.sources] == ["x", "/data/b"]
    assert [evaluator.shards for evaluator in config.eval if isinstance(evaluator, RetrievalConfig)] == ["held"]
    assert config.data.views.flip == 0.2
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.output == Path("a=b")


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 5e-4, eps: 1E-8, weight_decay: 1}\ndata: {samples: 2_823_019}\nname: 2024-01-01\n")
    config = load_config(path)
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (5e-4, 1e-8, 1.0)
    assert config.data.samples == 2823019
    assert config.name == "2024-01-01"


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "train.epoch: no such key; did you mean train.epochs?"),
        ("lr=3", "lr: no such key; did you mean optimizer.lr?"),
        ("data.sources.1.shard=q", "data.sources.1.shard: no such key; did you mean data.sources.1.shards?"),
        ("train.epochs=0", "train.epochs: 0 should be greater than 0"),
        ("train.epochs=true", "train.epochs: true should be a valid integer"),
        ("train.epochs=1.5", "train.epochs: 1.5 should be a valid integer"),
        ("seed=9223372036854775808", "seed: 9223372036854775808 should be less than 9223372036854775808"),
        ("seed=99999999999999999999999999", "seed: 99999999999999999999999999 should be less than 9223372036854775808"),
        ("optimizer.lr=.nan", "optimizer.lr: NaN should be a finite number"),
        ("precision=fp8", "precision: \"fp8\" should be 'bf16', 'fp32' or 'fp16'"),
        ("train=5", "train: 5 should be an object"),
        ("data.captions.count=1", "data.captions.global_count: 2 must be at most count (1)"),
        ("data.sources.2.name=c", "data.sources.2.name: '2' must be a position in a list of 2"),
        ("train.epochs.x=3", "train.epochs is 4 and has no keys below it"),
        ("data.sources=[{name: a}]", "data.sources.0.shards: this key is required and missing"),
        ("train.epochs", "'train.epochs' is not an override; the form is dotted.key=value"),
        (".train=3", "'.train=3' is not an override; the form is dotted.key=value"),
        ("train..epochs=3", "'train..epochs=3' is not an override; the form is dotted.key=value"),
        ("train={a", "train: line 1 is not valid YAML"),
        ("eval=[{kind:", "rule: quotes around all of it, 'eval=...', or the shell parts it"),
        ("eval=[{kind:retrieval}]", "eval.0.kind: this key is required and missing; rule: a blank stands behind each"),
        ("log.wandb.project=a/b", 'log.wandb.project: "a/b" must be at most 128 characters, none of / '),
        ("output=/data/\udcff", "holds bytes that are no UTF-8; rule: keys and values are UTF-8"),
        (f"name={'n' * 201}", "must be a folder's plain name: at most 200 letters"),
    ],
)
def test_a_wrong_override_is_named(run: Path, override: str, words: str) -> None:
    assert refusal(run, override).startswith("command line: ")
    assert words in refusal(run, override)


def test_a_dotted_key_in_a_file_gets_the_way_out(run: Path) -> None:
    run.write_text(f"{run.read_text()}\ntrain.max_steps: 3\n")
    rule = "rule: in a file a key stands below its section, indented, on a line of its own"
    assert refusal(run) == f"{run}: train.max_steps: no such key; {rule}"


def test_an_error_names_the_file_that_set_the_key(run: Path) -> None:
    (run.parent / "shared" / "base.yaml").write_text("train: {epochs: -1}\n")
    assert refusal(run) == f"{run.parent}/shared/base.yaml: train.epochs: -1 should be greater than 0"
    # The command line mends it, so that the next error is the run's own.
    run.write_text(run.read_text() + "oputput: x\n")
    assert refusal(run, "train.epochs=1") == f"{run}: oputput: no such key; did you mean output?"


@pytest.mark.parametrize(
    ("keys", "mended", "override", "key"),
    [
        # What the file says; what makes it break a rule, by way of another key than the one that the error names.
        ("data: {captions: {global_count: 2}}", "data.captions.count=2", "data.captions.count=1", "global_count"),
        ("model: {vision: {width: 768}}", "model.vision.head_width=32", "model.vision.head_width=65", "width"),
        (
            "model: {vision: {image_size: 224}}",
            "model.vision.patch_size=32",
            "model.vision.patch_size=65",
            "image_size",
        ),
        ("model: {text: {width: 512}}", "model.text.heads=4", "model.text.heads=7", "width"),
        ("model: {text: {width: 512}}", "model.embed_dim=512", "model.embed_dim=256", "width"),
        ("model: {embed_dim: 512}", "model.pooler_heads=4", "model.pooler_heads=7", "embed_dim"),
        ("data: {views: {local_size: 90}}", "data.views.local_crops=0", "data.views.local_crops=1", "local_size"),
        ("data: {views: {local_size: 96}}", "model.vision.patch_size=32", "model.vision.patch_size=28", "local_size"),
        ("model: {text: {vocab_size: 99}}", "data.sources=[]", "data.sources=[{name: a, shards: x}]", "vocab_size"),
        ("data: {last_batch: drop}", "train.epoch_steps_multiple=1", "train.epoch_steps_multiple=2", "last_batch"),
        ("resume: b", "init_from=null", "init_from=a", "resume"),
        ("optimizer: {warmup_steps: 9}", "train.schedule_steps=10", "train.schedule_steps=9", "warmup_steps"),
        ("eval: {every: 5, retrieval: {shards: x}}", "eval.every=6", "eval.retrieval=null", "every"),
    ],
)
def test_a_broken_rule_names_who_set_the_last_of_its_keys(
    keys: str, mended: str, override: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{keys}\n")
    load_config(path, [mended])
    assert re.match(rf"command line: [a-z_.]*{key}: ", refusal(path, override))


def test_of_two_bases_the_later_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("data: {captions: {global_count: 1, count: 1}}\n")
    (tmp_path / "large.yaml").write_text("data: {captions: {global_count: 2}}\n")
    path = tmp_path / "run.yaml"
    path.write_text("extends: [small.yaml, large.yaml]\n")
    assert refusal(path).startswith(f"{tmp_path}/large.yaml: data.captions.global_count: 2 ")
    path.write_text("extends: [large.yaml, small.yaml]\ndata: {captions: {global_count: 3}}\n")
    assert refusal(path).startswith(f"{path}: data.captions.global_count: 3 ")


@pytest.mark.parametrize("name", ["../../esc", "a/b", "/abs", "..", ".hidden", "", "a b", "a\nb", "a\n"])
def test_a_run_s_name_cannot_leave_the_output_folder(name: str, run: Path) -> None:
    message = refusal(run, f"name={json.dumps(name)}")
    assert message.startswith(f"command line: name: {json.dumps(name)} must be a folder's plain name")


def test_plain_names_pass(run: Path) -> None:
    for name in ("cc3m_vitb16", "2024-01-01", "v1.2", "größe"):
        assert load_config(run, [f"name={name}"]).name == name


def test_several_errors_are_counted(run: Path) -> None:
    assert refusal(run, "train.epochs=0", "seed=-1").endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "holds a list; a config is a mapping of keys"),
        ("train: {epochs: 1\n", "line 2 is not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2 is not valid YAML: key 'seed' is given twice"),
        ("seed: &here [*here]\n", "a value holds itself, or lies too deep"),
        ("seed: &here {is: *here}\n", "a value holds itself, or lies too deep"),
        (f"seed: {'[' * 3000}\n", "a value holds itself, or lies too deep"),
        ("extends: 5\n", "extends: 5 must be a path or a list of paths"),
        ("extends: none.yaml\n", "none.yaml: no such config file"),
        (
            "extends: cc3m_vitb16\n",
            "cc3m_vitb16: no such config file; the shipped run of this name is cosmos:cc3m_vitb16",
        ),
        ("extends: .\n", ": is a folder; a config is a YAML file"),
        ("extends: wrong.yaml\n", "extends: a file extends itself"),
        ('extends: "a\\0b"\n', 'extends: "a\\u0000b" holds the character NUL; rule: no text of a run does'),
        ('output: "a\\0b"\n', '"a\\u0000b" holds the character NUL'),
        ('eval: [{kind: retrieval, shards: "a\\0b"}]\n', '"a\\u0000b" holds the character NUL'),
        ('extends: "a\\ud800"\n', 'extends: "a\\ud800" holds bytes that are no UTF-8'),
        ("1: 2\n", "key 1 must be text"),
        ("optimizer: {lr: 0,2}\n", "key 2 must be text; rule: decimals stand behind a point, 0.2"),
        ("name: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    message = refused_text(tmp_path, text)
    assert "wrong.yaml" in message
    assert words in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.yaml") == f"{tmp_path}/absent.yaml: no such config file"


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: is a folder; a config is a YAML file"


def test_dumped_configs_read_back_equal(run: Path, tmp_path: Path) -> None:
    config = load_config(run, ["eval.retrieval.shards=held", "log.wandb={mode: offline}", "optimizer.eps=1.5e-9"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert yaml.safe_load(dump_config(config))["optimizer"]["gradient_scale"] == "true"


def test_valid_keys_are_their_own_nearest() -> None:
    keys = valid_keys()
    assert "data.sources.N.shards" in keys
    assert "eval.N.captions" in keys
    assert {nearest_key(key) for key in keys} == set(keys)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_any_unknown_key_gets_a_valid_suggestion(key: str) -> None:
    assert re.sub(r"\.\d+\.", ".N.", nearest_key(key)) in valid_keys()


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.yaml: cannot be read: 'utf-8' codec") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_files_that_name_each_other_many_times_are_refused(run: Path) -> None:
    for level in range(9):
        (run.parent / f"level{level}.yaml").write_text(f"extends: [{', '.join([f'level{level + 1}.yaml'] * 10)}]\n")
    (run.parent / "level9.yaml").write_text("seed: 1\n")
    run.write_text("extends: level0.yaml\n")
    assert "extends: more than 100 files; rule: name fewer, or each fewer times" in refusal(run)


def test_a_long_chain_of_files_is_refused(run: Path) -> None:
    for level in range(2000):
        (run.parent / f"level{level}.yaml").write_text(f"extends: level{level + 1}.yaml\n")
    run.write_text("extends: level0.yaml\n")
    assert refusal(run).startswith(f"{run}: extends: more than 100 files")


def test_a_folder_whose_name_is_no_utf8_is_named() -> None:
    with pytest.raises(
        UserError,
        match=r'^command line: "/data/caf\\udce9" holds bytes that are no UTF-8; rule: all texts of a run are UTF-8$',
    ):
        make_config({"data": {"sources": [{"name": "s", "shards": "/data/caf\udce9"}]}})


def test_a_utf16_file_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("name: a\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"run\.yaml: is UTF-16; rule: a config is UTF-8, save it as UTF-8"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ema:\n", "ema: null should be an object; rule: leave the key out, or give it keys"),
        ("eval:\n", "eval: null should be a valid array; rule: leave the key out, or give it entries"),
        (
            "eval: {kind: retrieval, name: a, shards: x}\n",
            'eval.kind: "retrieval" stands in a mapping, but eval is a list of evaluations: put `- ` before',
        ),
    ],
)
def test_sections_of_the_wrong_form_get_the_way_out(run: Path, text: str, words: str) -> None:
    path = run.with_name("form.yaml")
    path.write_text(f"extends: {run.name}\n{text}")
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(path)
