# Two commands on a bare machine: `make quickstart` and `make test`. Each makes .venv, installs what it needs, does its job;
# a second run installs nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: help quickstart world play-model decoders encoders senses test test-slow test-gpu test-slurm bench lint docs lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip

# One stamp for each set of packages, so that pip runs only when pyproject.toml or the lock file has changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

quickstart: $(VENV)/.installed-game ## record a game, train the image VAE on it (at most 6 minutes), write runs/quickstart/report.md
	$(RUN) owl fit --config experiments/quickstart.yaml --ckpt_path last

GAME := data/doom-96x160-world
WORLD := runs/world_model_quickstart
INVERSE_DYNAMICS := runs/inverse_dynamics_quickstart

world: $(VENV)/.installed-game ## the whole chain (80 to 100 minutes): game, image VAE, latents, world model, a report with generated frames
	@echo "80 to 100 minutes: image VAE 6 and its game 1, footage 4, latents 3, world model 60, inverse dynamics 5, rollouts 8"
	$(MAKE) quickstart
	$(RUN) owl data record $(GAME) --frames 60000 --size 96x160 --scenario deathmatch --seed 1
	$(RUN) owl data encode runs/quickstart/checkpoints/last.ckpt $(GAME) $(GAME)-latents --keep controls,rgb
	$(RUN) owl fit --config experiments/world_model_quickstart.yaml --ckpt_path last
	$(RUN) owl fit --config experiments/inverse_dynamics_quickstart.yaml --ckpt_path last
	$(RUN) owl rollout $(WORLD)/checkpoints/last.ckpt --data $(GAME)-latents --out $(WORLD)/rollout \
	  --decoder runs/quickstart/checkpoints/last.ckpt --inverse_dynamics $(INVERSE_DYNAMICS)/checkpoints/last.ckpt \
	  --frames 1000 --clips 64 --horizon 16

STUDENTS := few_step self_forcing

play-model: $(VENV)/.installed-game ## a student of `make world`'s model in two steps per frame (about 110 minutes), and a page that compares teacher and students
	@test -f $(WORLD)/checkpoints/last.ckpt || { echo "make play-model: there is no $(WORLD); run make world" >&2; exit 1; }
	@echo "about 110 minutes: consistency distillation 30, self forcing 60, rollouts of three world models 20"
	for name in $(STUDENTS); do $(RUN) owl fit --config experiments/$${name}_quickstart.yaml --ckpt_path last || exit 1; done
	$(RUN) owl rollout $(WORLD)/checkpoints/last.ckpt $(STUDENTS:%=runs/%_quickstart/checkpoints/last.ckpt) \
	  --data $(GAME)-latents --out runs/play_model --decoder runs/quickstart/checkpoints/last.ckpt \
	  --inverse_dynamics $(INVERSE_DYNAMICS)/checkpoints/last.ckpt --frames 500 --clips 64 --horizon 16
	@echo "play it: python -m owl play runs/self_forcing_quickstart/checkpoints/last.ckpt --data $(GAME)-latents"

DECODERS := gan_decoder diffusion_decoder distill_decoder frame_pair

decoders: $(VENV)/.installed-game ## four decoders on the quickstart's frozen encoder (20 minutes each), and a page that compares them
	$(MAKE) quickstart
	for name in $(DECODERS); do $(RUN) owl fit --config experiments/$${name}_quickstart.yaml --ckpt_path last || exit 1; done
	$(RUN) owl compare runs/quickstart $(DECODERS:%=runs/%_quickstart) --data data/doom-mix-96x160 --out runs/decoders

END_TO_END := $(GAME)-end-to-end
ADVERSARIAL := --config experiments/gan_decoder_quickstart.yaml --ckpt_path last
SHORT := --config experiments/world_model_quickstart.yaml --ckpt_path last --trainer.max_steps 500 --trainer.callbacks null
ROLLOUTS := --clips 64 --horizon 16 --frames 1000

encoders: $(VENV)/.installed-game ## adversarial training with a frozen and with a trained encoder (about an hour and a half), and a world model of each one's latents
	$(MAKE) quickstart
	$(RUN) owl fit $(ADVERSARIAL)
	$(RUN) owl fit $(ADVERSARIAL) --name gan_end_to_end --model.train_encoder true --trainer.callbacks null
	$(RUN) owl data record $(GAME) --frames 60000 --size 96x160 --scenario deathmatch --seed 1
	$(RUN) owl data encode runs/quickstart/$(LAST) $(GAME) $(GAME)-latents --keep controls,rgb
	$(RUN) owl data encode runs/gan_end_to_end/$(LAST) $(GAME) $(END_TO_END) --keep controls,rgb
	$(RUN) owl fit $(SHORT) --name world_model_frozen
	$(RUN) owl fit $(SHORT) --name world_model_end_to_end --data.init_args.path $(END_TO_END)
	$(RUN) owl rollout runs/world_model_frozen/$(LAST) --data $(GAME)-latents --decoder runs/gan_decoder_quickstart $(ROLLOUTS)
	$(RUN) owl rollout runs/world_model_end_to_end/$(LAST) --data $(END_TO_END) --decoder runs/gan_end_to_end $(ROLLOUTS)

FOOTAGE := data/doom-96x160-senses
WITH_SOUND := runs/world_model_av_quickstart
LAST := checkpoints/last.ckpt

senses: $(VENV)/.installed-game,audio ## sound, depth and motion (about two and a half hours): audio VAE and decoder, seven channels, a world model with sound
	@$(VENV)/bin/python -c "import ctypes; ctypes.CDLL('libopenal.so.1')" 2>/dev/null || \
	  { echo "make senses: the game's sound needs the system library libopenal1; run apt-get install libopenal1" >&2; exit 1; }
	$(MAKE) quickstart
	for name in audio_vae audio_gan_decoder image_vae_7; do \
	  $(RUN) owl fit --config experiments/$${name}_quickstart.yaml --ckpt_path last || exit 1; done
	$(RUN) owl data record $(FOOTAGE) --frames 60000 --size 96x160 --scenario deathmatch --seed 1 --audio --flow
	$(RUN) owl data encode runs/quickstart/$(LAST) runs/quickstart/$(LAST) runs/audio_vae_quickstart/$(LAST) \
	  $(FOOTAGE) $(FOOTAGE)-latents --name latent,motion_latent,audio_latent --motion_stride 2 --keep controls,rgb,flow,audio
	$(RUN) owl fit --config experiments/world_model_av_quickstart.yaml --ckpt_path last
	$(RUN) owl rollout $(WITH_SOUND)/$(LAST) --data $(FOOTAGE)-latents --out $(WITH_SOUND)/rollout --frames 1000 --clips 64

test: $(VENV)/.installed-dev ## the whole test suite
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-dev ## longer checks of what training reaches
	$(RUN) pytest -m slow

test-gpu: $(VENV)/.installed-dev ## checks that need a GPU, with a table of results
	$(RUN) pytest -m gpu tests/gpu -s --show-capture=no

test-slurm: $(VENV)/.installed-dev ## a real SLURM of two nodes on this machine (root on Debian): preempted jobs resume exactly, sweeps lose no trial
	$(RUN) tests.cluster.preempted /tmp/owl-slurm

build/stable-audio-tools: | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --no-deps --target $@ stable-audio-tools==0.0.19

bench: $(VENV)/.installed-dev build/stable-audio-tools ## every benchmark, each a ratio against a named baseline
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(RUN) benchmarks.$$(basename $$script .py) || exit 1; done

lint: $(VENV)/.installed-dev ## formatting, lint and types
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

docs: $(VENV)/.installed-docs ## build the documentation into site/
	$(RUN) mkdocs build --strict

# Left out: libraries of CUDA, whose versions each build of PyTorch pins itself, and suffixes such as +cpu.
lock: ## renew constraints.txt with the newest releases that pyproject.toml allows; run `make test` before it is committed
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade pip
	.venv-lock/bin/pip install --quiet --editable '.[dev,docs]'
	.venv-lock/bin/pip freeze --exclude-editable | grep -vE '^(nvidia-|cuda-|triton==)' | sed 's/+.*//' > .venv-lock/frozen
	{ sed '/^[^#]/d' constraints.txt; cat .venv-lock/frozen; } > .venv-lock/constraints.txt
	mv .venv-lock/constraints.txt constraints.txt
	rm -rf .venv-lock

clean: ## remove what the tools leave behind, but neither data nor runs
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache *.egg-info
