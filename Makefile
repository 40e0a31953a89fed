# Everything a newcomer types: each target does its own set-up.
PYTHON ?= python3
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: demo example-air example-defects example-speech homogeneous ledger privacy test test-all test-federated test-slurm test-anvil test-split test-report lint federated clean

$(VENV)/core: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/dev: $(VENV)/core requirements-dev.txt
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: $(VENV)/core  ## train 8 workers on the embedded digits, leave plots
	$(RUN) main.py --run_name demo --overwrite
	@echo "open results/demo/report.html in a browser"

example-air: $(VENV)/core  ## PM10 at 69 stations: gossip, a server, each alone, all data in one place, and influence
	$(RUN) examples/air/compare.py

example-speech: $(VENV)/core  ## which language is spoken? Debian's telephone prompts, examples/speech
	$(RUN) examples/speech/sounds.py results/speech/sounds
	$(RUN) examples/speech/compare.py results/speech/sounds

$(VENV)/elpv: $(VENV)/core
	$(VENV)/bin/pip install --quiet elpv-dataset==1.0.0.post1 -c constraints.txt
	@touch $@

example-defects: $(VENV)/elpv  ## defective solar cells (91 MB, CC BY-NC-SA 4.0); minutes (examples/defects/)
	$(RUN) examples/defects/compare.py

$(VENV)/homogeneous: $(VENV)/core requirements-homogeneous.txt
	$(VENV)/bin/pip install --quiet -r requirements-homogeneous.txt -c constraints.txt
	@touch $@

homogeneous: $(VENV)/homogeneous  ## an agent learns which node trains next (docs/homogeneous.md)
	$(RUN) -m homogeneous --resume

$(VENV)/privacy: $(VENV)/core requirements-privacy.txt
	$(VENV)/bin/pip install --quiet -r requirements-privacy.txt -c constraints.txt
	@touch $@

privacy: $(VENV)/privacy  ## what --dp_noise needs: Opacus counts epsilon (docs/privacy.md)

$(VENV)/ledger: $(VENV)/core requirements-ledger.txt
	$(VENV)/bin/pip install --quiet -r requirements-ledger.txt -c constraints.txt
	@touch $@

ledger: $(VENV)/ledger  ## what records, contracts and payouts need (docs/ledger.md)

test: $(VENV)/dev  ## the fast tests, one process a core
	$(RUN) -m pytest -n auto --dist worksteal

test-all: $(VENV)/dev $(VENV)/homogeneous $(VENV)/ledger $(VENV)/privacy  ## the slow tests too, and those of rooms with packages of their own
	$(RUN) -m pytest -n auto --dist worksteal -m "not deployment and not slurm and not anvil and not mesh and not browser"

$(VENV)/slurm: $(VENV)/core requirements-slurm.txt
	$(VENV)/bin/pip install --quiet -r requirements-slurm.txt -c constraints.txt
	@touch $@

test-slurm: $(VENV)/dev $(VENV)/slurm  ## coalitions as jobs of a SLURM of one node (Debian: slurmctld slurmd slurm-client munge)
	$(RUN) -m pytest tests/test_slurm.py -m slurm -rs

ANVIL := $(VENV)/anvil/node_modules/.bin

$(ANVIL)/anvil: $(VENV)/core
	npm install --silent --no-audit --no-fund --prefix $(VENV)/anvil @foundry-rs/anvil@1.7.1
	@touch $@

test-anvil: $(VENV)/dev $(VENV)/ledger $(ANVIL)/anvil  ## the contracts' tests on a second implementation of the EVM (npm)
	PATH="$(CURDIR)/$(ANVIL):$$PATH" $(RUN) -m pytest tests -k ledger -m anvil

test-split: $(VENV)/dev  ## meshes of pipelines, and stages that are killed, stopped and restarted; five minutes
	$(RUN) -m pytest tests/test_split_processes.py -n auto -m mesh

$(VENV)/browser: $(VENV)/dev requirements-browser.txt
	$(VENV)/bin/pip install --quiet -r requirements-browser.txt -c constraints.txt
	@touch $@

test-report: $(VENV)/browser  ## reports in headless Chromium, which must be installed (Debian: apt install chromium); a minute
	$(RUN) -m pytest tests/test_report_browser.py -m browser -rs

test-federated: $(VENV)/dev $(VENV)-federated/done  ## the Flower deployment on loopback, about five minutes
	$(RUN) -m pytest tests/test_federated.py -m deployment

$(VENV)-federated/done: requirements-federated.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-federated
	$(VENV)-federated/bin/pip install --quiet -r requirements-federated.txt
	@touch $@

federated: $(VENV)-federated/done  ## Flower, in an environment of its own (docs/federated.md)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(VENV)-federated results
