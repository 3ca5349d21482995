import math
from pathlib import Path

import pytest

from services.launcher.options import DEMO_NAME, UpOptions, given_settings, port_option, read_flags, up_options
from services.launcher.refusal import UserError


def resolve(*argv: str, environ: dict[str, str] | None = None) -> UpOptions:
    return up_options(read_flags(["up", *argv]), given_settings(environ or {}))


def test_without_flags_the_demo_model_is_served_under_its_name() -> None:
    options = resolve()
    assert options.model.endswith("models/demo")
    assert options.served_model_name == DEMO_NAME
    assert (options.prefill, options.decode, options.arrangement, options.host, options.port) == (
        1,
        1,
        "auto",
        "127.0.0.1",
        8000,
    )


def test_another_model_is_not_named_after_the_demo() -> None:
    assert resolve("--model", "/models/llama").served_model_name == ""


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("dtype=float32", {"dtype": "float32"}),
        ("max-model-len=4096", {"max_model_len": 4096}),
        ("enforce_eager=true", {"enforce_eager": True}),
        ('hf_overrides={"a": 1}', {"hf_overrides": {"a": 1}}),
        ("name=a=b", {"name": "a=b"}),
    ],
)
def test_engine_arguments_are_json_where_they_parse(flag: str, value: dict[str, object]) -> None:
    assert resolve("--engine-arg", flag).engine_args == value


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("arrangement: split\nkv_gib: 2\nqueue_s: 7\nengine_args: {dtype: float32, seed: 1}\n")
    environ = {"BATON_CONFIG": str(file), "BATON_KV_GIB": "3", "BATON_ARENA_GIB": "1", "BATON_HOME": "/x"}
    options = resolve("--arena-gib", "4", "--engine-arg", "seed=2", environ=environ)
    assert (options.arrangement, options.kv_gib, options.arena_gib) == ("split", 3.0, 4.0)
    assert options.engine_args == {"dtype": "float32", "seed": 2}
    assert options.given == {"queue_s": 7}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"BATON_PREFIL": "2"}, "unknown setting BATON_PREFIL"),
        ({"BATON_NATS_URL": "nats://x"}, "BATON_NATS_URL is set by the launcher"),
        ({"BATON_SHARE_PORT": "true"}, "BATON_SHARE_PORT is set by the launcher"),
        ({"BATON_CONFIG": "/nowhere.yaml"}, "cannot read /nowhere.yaml"),
        ({"BATON_ENGINE_ARGS": "[1]"}, "must be a JSON object"),
        ({"BATON_KV_GIB": "much"}, "wrong value"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("/", "/")):
        resolve(environ=environ)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nodes", "3"], "--nodes must be between 1 and the number of workers (2), not 3"),
        (["--nodes", "0"], "--nodes must be between 1"),
        (["--gateways", "0"], "--gateways must be between 1 and 64, not 0"),
        (["--gateways", "65"], "--gateways must be between 1 and 64, not 65"),
        (["--gateways", "many"], "invalid int value"),
        (["--engine", "real"], "invalid choice"),
        (["--sim-speed", "2"], "--sim-speed is for the sim engine: add --engine sim"),
        (["--engine", "vllm", "--sim-kv", "off"], "--sim-kv is for the sim engine"),
        (["--engine", "sim", "--sim-speed", "0"], "sim_speed"),
        (["--engine", "sim", "--sim-speed", "fast"], "sim_speed"),
        (["--engine", "sim", "--sim-kv", "full"], "invalid choice"),
        (["--pre", "2"], "unrecognized arguments"),
        (["--arrangement", "both"], "invalid choice"),
        (["--prefill", "two"], "invalid int value"),
        (["--engine-arg", "dtype"], "KEY=VALUE"),
        (["--decode", "0"], "--decode must be at least 1"),
        (["--prefill", "0", "--arrangement", "split"], "--prefill must be at least 1"),
    ],
)
def test_what_is_not_offered_is_refused_in_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(*argv)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_prefill_workers_are_fine_when_nothing_must_be_split() -> None:
    assert resolve("--prefill", "0", "--arrangement", "unsplit").prefill == 0


@pytest.mark.parametrize(("argv", "gateways"), [([], 1), (["--gateways", "1"], 1), (["--gateways", "64"], 64)])
def test_gateways_are_counted(argv: list[str], gateways: int) -> None:
    assert resolve(*argv).gateways == gateways


def test_the_sim_engine_has_a_speed_up_to_infinity(tmp_path: Path) -> None:
    options = resolve("--engine", "sim", "--sim-speed", "inf", "--sim-kv", "off")
    assert (options.engine, options.sim_speed, options.sim_kv) == ("sim", math.inf, "off")
    assert resolve(environ={"BATON_ENGINE": "sim", "BATON_SIM_SPEED": "2.5"}).sim_speed == 2.5
    file = tmp_path / "baton.yaml"
    file.write_text("engine: sim\nsim_speed: .inf\nsim_kv: off\n")  # YAML reads a bare off as false
    options = resolve(environ={"BATON_CONFIG": str(file)})
    assert (options.sim_speed, options.sim_kv) == (math.inf, "off")


@pytest.mark.parametrize("command", ["status", "down", "chat hello", "logs", "trace", "tap", "config", "up"])
def test_every_command_takes_a_port(command: str) -> None:
    flags = read_flags([*command.split(), "--port", "8123"])
    assert port_option(flags, {"port": "9000"}) == 8123


@pytest.mark.parametrize(("given", "port"), [({}, 8000), ({"port": "9000"}, 9000)])
def test_the_port_comes_from_the_variable_without_a_flag(given: dict[str, str], port: int) -> None:
    assert port_option(read_flags(["status"]), given) == port
