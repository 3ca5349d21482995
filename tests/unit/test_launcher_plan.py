import json
import math
from pathlib import Path

import msgspec
import pytest

from services.launcher.machine import GIB, Machine, free_ports
from services.launcher.model import Model, read_model
from services.launcher.options import UpOptions
from services.launcher.plan import Place, Plan, Process, core_shares, gpu_shares, plan, ports_needed, resolved
from services.launcher.refusal import UserError
from shared.errors import SettingsError

LAPTOP = Machine(cores=((0,), (1,)), memory_bytes=16 * GIB, free_memory_bytes=12 * GIB, free_shm_bytes=8 * GIB)
SMALL = Model(path="/m/small", name="small", weights_bytes=10**7, kv_values_per_token=1024, max_len=2048)
PROGRAMS = {role: (role,) for role in ("nats", "redis", "kv", "prefill", "decode", "gateway")}


def make(options: UpOptions | None = None, machine: Machine = LAPTOP, model: Model = SMALL) -> Plan:
    options = options or UpOptions()
    ports = tuple(range(20000, 20000 + ports_needed(options)))
    place = Place(run_folder="/run/x", ports=ports, token="secret")  # noqa: S106
    return plan(options, machine, model, PROGRAMS, place)


def one(made: Plan, service_id: str) -> Process:
    return next(process for process in made.processes if process.id == service_id)


def test_a_plan_holds_every_process_with_an_address_of_its_own() -> None:
    made = make(UpOptions(prefill=2, decode=2))
    ids = [process.id for process in made.processes]
    assert ids == ["nats-0", "redis-0", "kv-0", "prefill-0", "prefill-1", "decode-0", "decode-1", "gateway-0"]
    probes = [process.probe_url for process in made.processes if process.probe_url]
    assert len(set(probes)) == len(probes) == 6
    assert made.address == one(made, "gateway-0").probe_url == "http://127.0.0.1:8000"
    assert {process.node for process in made.processes if process.role in ("kv", "prefill", "decode")} == {"node-0"}


def test_gateways_share_the_port_and_are_asked_one_by_one() -> None:
    made = make(UpOptions(prefill=2, gateways=3))
    gateways = [process for process in made.processes if process.role == "gateway"]
    assert [gateway.id for gateway in gateways] == ["gateway-0", "gateway-1", "gateway-2"]
    probes = [process.probe_url for process in made.processes if process.probe_url]
    assert len(set(probes)) == len(probes) == 7
    assert made.address == "http://127.0.0.1:8000"
    assert made.address not in probes
    for gateway in gateways:
        settings = msgspec.structs.asdict(resolved(gateway))
        assert (settings["port"], settings["share_port"]) == (8000, True)
        assert gateway.probe_url == f"http://127.0.0.1:{settings['probe_port']}"


def test_one_gateway_has_its_port_for_itself() -> None:
    settings = msgspec.structs.asdict(resolved(one(make(), "gateway-0")))
    assert (settings["share_port"], settings["probe_port"]) == (False, 0)
    assert ports_needed(UpOptions()) == 4


@pytest.mark.parametrize("engine", ["vllm", "sim"])
def test_gateways_take_memory(engine: str) -> None:
    needed = 3 * GIB + (GIB if engine == "vllm" else 0)
    little = msgspec.structs.replace(LAPTOP, free_memory_bytes=needed + 2 * GIB)
    options = UpOptions(engine=engine, arena_gib=0.1, kv_gib=0.1)
    make(options, machine=little)
    with pytest.raises(UserError, match="start fewer workers or gateways"):
        make(msgspec.structs.replace(options, gateways=64), machine=little)


def test_every_service_reads_the_settings_that_were_planned() -> None:
    made = make(UpOptions(engine_args={"dtype": "float32"}, given={"queue_s": "3", "lease_s": 60}, port=8123))
    gateway, worker, kv = (
        msgspec.structs.asdict(resolved(one(made, name))) for name in ("gateway-0", "decode-0", "kv-0")
    )
    assert (gateway["queue_s"], gateway["port"], gateway["cluster"]) == (3.0, 8123, "baton-8123")
    assert (worker["lease_s"], worker["engine_args"]) == (60.0, {"dtype": "float32"})
    assert worker["kv_socket"] == kv["kv_socket"] == "/run/x/node-0.sock"
    assert gateway["redis_url"] == worker["redis_url"] == kv["redis_url"] == "unix:///run/x/redis.sock"
    assert gateway["nats_url"] == "nats://127.0.0.1:20000"
    assert [one["nats_user"] for one in (gateway, worker, kv)] == ["gateway", "decode", "kv"]
    assert len({made.nats_url, *(one["nats_password"] for one in (gateway, worker, kv))}) == 4
    assert gateway["served_model_name"] == worker["served_model_name"] == "small"


def test_only_a_cluster_that_wants_keys_keeps_what_redis_holds() -> None:
    options = UpOptions(keys="redis", host="0.0.0.0")
    place = Place(run_folder="/run/x", ports=tuple(range(4)), token="t", redis_folder="/kept")  # noqa: S106
    made = plan(options, LAPTOP, SMALL, PROGRAMS, place)
    assert msgspec.structs.asdict(resolved(one(made, "gateway-0")))["keys"] == "redis"
    command = " ".join(one(made, "redis-0").command)
    assert "--appendonly yes" in command
    assert "--dir /kept" in command
    assert "--appendonly no" in " ".join(one(make(), "redis-0").command)
    assert "--maxmemory-policy volatile-ttl" in command


def test_no_command_line_holds_a_password() -> None:
    made = make()
    commands = str([process.command for process in made.processes])
    assert "secret" not in commands
    for process in made.processes:
        assert process.settings.get("nats_password", "secret") not in commands


def test_a_gateway_with_a_certificate_is_asked_elsewhere() -> None:
    made = make(UpOptions(given={"https_cert": "/c", "https_key": "/k"}))
    assert made.address == "https://127.0.0.1:8000"
    gateway = one(made, "gateway-0")
    assert gateway.probe_url == f"http://127.0.0.1:{gateway.settings['probe_port']}"
    assert gateway.settings["share_port"] is False


def test_a_setting_that_a_service_would_refuse_is_refused_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match="drain_s"):
        make(UpOptions(given={"drain_s": "soon"}))


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000"),
    ],
)
def test_the_address_is_one_that_this_machine_can_reach(host: str, address: str) -> None:
    assert make(UpOptions(host=host)).address == address


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        (((0,), (1,)), 2, ["0", "1"]),
        (((0,), (1,), (2,), (3,), (4,)), 2, ["0-2", "3-4"]),
        (((0, 4), (1, 5), (2, 6), (3, 7)), 2, ["0-1", "2-3"]),  # one thread of each core
        (((0, 2), (1, 3)), 3, ["0-1", "2", "3"]),  # more workers than cores, enough threads
        (((0,), (1,)), 3, ["", "", ""]),  # too few: nobody is pinned
        (((0,), (2,), (3,), (5,)), 1, ["0,2-3,5"]),
    ],
)
def test_cores_are_shared_out_evenly(cores: tuple[tuple[int, ...], ...], workers: int, shares: list[str]) -> None:
    assert core_shares(msgspec.structs.replace(LAPTOP, cores=cores), workers) == shares


@pytest.mark.parametrize(
    ("gpus", "workers", "engine_args", "expected"),
    [
        ((), 2, {}, (["", ""], 0.0)),
        (("0", "1"), 2, {}, (["0", "1"], 0.0)),
        (("0",), 2, {}, (["0", "0"], 0.45)),
        (("0", "1", "2", "3"), 2, {"tensor_parallel_size": 2}, (["0,1", "2,3"], 0.0)),
        (("0", "1"), 3, {}, (["0", "1", "0"], 0.45)),
    ],
)
def test_gpus_are_shared_out(
    gpus: tuple[str, ...], workers: int, engine_args: dict[str, int], expected: tuple[list[str], float]
) -> None:
    assert gpu_shares(msgspec.structs.replace(LAPTOP, gpus=gpus), workers, engine_args) == expected


def test_workers_on_one_gpu_share_its_memory_unless_told_otherwise() -> None:
    machine = msgspec.structs.replace(LAPTOP, gpus=("0",))
    worker = one(make(machine=machine), "decode-0")
    assert worker.environ == {"CUDA_VISIBLE_DEVICES": "0", "VLLM_RPC_BASE_PATH": "/run/x"}
    assert worker.settings["engine_args"] == {"gpu_memory_utilization": 0.45}
    assert worker.settings["kv_gib"] == 0.0
    told = make(UpOptions(engine_args={"gpu_memory_utilization": 0.2}), machine=machine)
    assert one(told, "decode-0").settings["engine_args"] == {"gpu_memory_utilization": 0.2}


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="needs 4 GPUs and there are 1"):
        gpu_shares(msgspec.structs.replace(LAPTOP, gpus=("0",)), 2, {"tensor_parallel_size": 4})


@pytest.mark.parametrize(
    ("options", "arena_gib", "kv_gib"),
    [
        (UpOptions(), 1.6, 0.5),  # a tenth of 16 GiB; a small model
        (UpOptions(arena_gib=0.25, kv_gib=1.5), 0.25, 1.5),
        (UpOptions(engine_args={"max_model_len": 262144}), 2.0, 2.4),  # two prompts of 1 GiB; 15 % of memory
        (UpOptions(engine_args={"max_model_len": 262144, "dtype": "bfloat16"}), 1.6, 2.4),
    ],
)
def test_default_sizes_follow_memory_and_model(options: UpOptions, arena_gib: float, kv_gib: float) -> None:
    made = make(options, msgspec.structs.replace(LAPTOP, free_memory_bytes=16 * GIB))
    assert one(made, "kv-0").settings["arena_gib"] == pytest.approx(arena_gib, abs=0.01)
    assert one(made, "decode-0").settings["kv_gib"] == pytest.approx(kv_gib, abs=0.01)


def test_little_shared_memory_makes_the_default_arena_smaller_while_two_prompts_fit() -> None:
    made = make(machine=msgspec.structs.replace(LAPTOP, free_shm_bytes=GIB // 16))
    assert one(made, "kv-0").settings["arena_gib"] == pytest.approx(0.9 / 16, abs=0.001)


@pytest.mark.parametrize(
    ("options", "machine", "words"),
    [
        (UpOptions(), {"free_shm_bytes": 2**20}, "shared memory has 1 MiB free"),
        (UpOptions(arena_gib=9), {}, "the KV arena needs 9.0 GiB"),
        (UpOptions(), {"free_memory_bytes": 4 * GIB}, "start fewer workers"),
        (UpOptions(prefill=20), {}, "of memory and 12.0 GiB is free"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options: UpOptions, machine: dict[str, int], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        make(options, msgspec.structs.replace(LAPTOP, **machine))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "values", "max_len"),
    [
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "hidden_size": 64,
                "max_position_embeddings": 512,
            },
            2 * 2 * 2 * 8,
            512,
        ),
        ({"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "head_dim": 16}, 2 * 3 * 4 * 16, 0),
        ({"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 1024}, 2 * 2 * 2 * 4, 1024),
        ({"text_config": {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 4}}, 2 * 4, 0),
        ({"num_hidden_layers": 10, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 10 * 576, 0),
    ],
)
def test_a_models_kv_size_is_read_from_its_config(
    tmp_path: Path, config: dict[str, object], values: int, max_len: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)  # the same weights once more
    model = read_model(str(tmp_path))
    assert (model.kv_values_per_token, model.max_len, model.weights_bytes) == (values, max_len, 100)
    assert (model.name, model.kv_bytes(10)) == (tmp_path.name, values * 40)


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model folder"):
        read_model(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_model(str(tmp_path))


def test_free_ports_differ() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(1024 <= port <= 65535 for port in ports)


def sim(**options: object) -> UpOptions:
    return UpOptions(engine="sim", **options)  # type: ignore[arg-type]


def test_sim_workers_are_not_pinned_and_get_no_arguments_of_vllms() -> None:
    machine = msgspec.structs.replace(LAPTOP, gpus=("0", "1"))
    for where in (machine, LAPTOP):
        worker = one(make(sim(sim_speed=math.inf, sim_kv="off"), machine=where), "decode-0")
        assert worker.environ == {}
        settings = msgspec.structs.asdict(resolved(worker))
        assert (settings["engine"], settings["engine_args"], settings["cpu_cores"]) == ("sim", {}, "")
        assert (settings["sim_speed"], settings["sim_kv"]) == (math.inf, "off")
    assert "sim_speed" not in one(make(), "decode-0").settings


def test_sim_workers_are_small() -> None:
    small = msgspec.structs.replace(LAPTOP, memory_bytes=4 * GIB, free_memory_bytes=3 * GIB)
    with pytest.raises(UserError):
        make(UpOptions(), machine=small)
    assert len(make(sim(), machine=small).processes) == 6


def test_without_kv_the_arena_holds_as_many_blocks_in_less_room() -> None:
    on, off = (one(make(sim(sim_kv=kv)), "kv-0").settings["arena_gib"] * GIB for kv in ("on", "off"))
    assert off / (64 + 8) == pytest.approx(on / (32 * 2048), rel=0.05)
    tiny = make(sim(sim_kv="off", engine_args={"kv_bytes_per_token": True, "max_model_len": 64}))
    assert one(tiny, "kv-0").settings["arena_gib"] > 0  # 0 would be kv_transfer's own default
    given = make(sim(sim_kv="off", arena_gib=0.5))
    assert one(given, "kv-0").settings["arena_gib"] == 0.5


def test_kv_of_true_size_needs_its_room() -> None:
    with pytest.raises(UserError, match="max_model_len"):
        make(sim(engine_args={"kv_bytes_per_token": True, "max_model_len": 16384}))
    made = make(sim(engine_args={"kv_bytes_per_token": True, "max_model_len": 2048}, decode=1))
    assert one(made, "kv-0").settings["arena_gib"] * GIB >= 2 * 2048 * 327680


def test_bad_arguments_of_the_sim_are_refused_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match="dtype"):
        make(sim(engine_args={"dtype": "float32"}))
