"""`baton config`: the settings of every service, as they run or as `up` would start them; secrets redacted."""

import yaml

from services.launcher.machine import read_machine
from services.launcher.model import read_model
from services.launcher.options import UpOptions
from services.launcher.plan import Place, Programs, plan, ports_needed
from services.launcher.state import ClusterFolder
from shared.settings import SERVICES, load, shown, to_environ


def config(options: UpOptions, folder: ClusterFolder, programs: Programs) -> int:
    record = folder.read()
    if record is not None:
        what = f"as they run on port {options.port}"
        settings = {s.id: (s.role, s.settings) for s in record.services if s.role in SERVICES}
    else:
        what = "as baton up would start them"
        place = Place(run_folder="/run-folder", ports=(0,) * ports_needed(options), token="token")  # noqa: S106
        model = read_model(options.model, options.revision, with_weights=options.engine != "sim")
        chosen = plan(options, read_machine(options.shm_dir), model, programs, place)
        settings = {p.id: (p.role, p.settings) for p in chosen.processes if p.role in SERVICES}
    print(f"# {what}")
    resolved = {key: shown(load(SERVICES[role], to_environ(values))) for key, (role, values) in settings.items()}
    print(yaml.safe_dump(resolved, sort_keys=False), end="")
    return 0
