"""The scripts for schedulers: they are parsed, and name flags that there are. None is run."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import launch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse_and_say_that_they_were_not_run(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Not run on a" in path.read_text()


def test_the_pods_of_gke_find_one_another():
    text = (SCRIPTS / "gke.yaml").read_text()
    assert "Not run on a" in text
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]
    pods = spec["template"]["spec"]
    (container,) = pods["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    # A pod of an indexed Job is <job>-<index>.<subdomain>, the headless service's name.
    name = service["metadata"]["name"]
    assert pods["subdomain"] == name and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    host, port = environment["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{job['metadata']['name']}-0.{name}" and port.isdecimal()
    assert int(environment["JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    assert "JAX_PROCESS_ID" in environment and spec["completionMode"] == "Indexed"
    (volume,), (mount,) = pods["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"]
    (folder,) = [a.removeprefix("--workdir=") for a in container["args"] if "--workdir=" in a]
    assert Path(folder).is_relative_to(mount["mountPath"])
    for flag in re.findall(r"--(\w+)=", " ".join(container["args"])):
        assert flag in launch.FLAGS
