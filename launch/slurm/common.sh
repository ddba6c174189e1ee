# Functions of all jobs; the sbatch scripts source this file. It needs bash and this project on the nodes, and no ssh.
# shellcheck shell=bash
#
#   TRAINER_HOME         the folder of the job on the shared file system: the project, or where tools/submit.py of an
#                        installed wheel was called; default: where sbatch was called
#   TRAINER_ENVIRONMENT  a script that sets modules, CUDA and the like; sourced if given
#   TRAINER_PYTHON       default: TRAINER_HOME/.venv/bin/python if that exists, else python; for a wheel the Python of
#                        tools/submit.py
#   TRAINER_INTERFACE    network interface between the nodes; default: the one on the route to the first node
#   TRAINER_DOCTOR       0 skips launch/doctor.py before the training
#   TRAINER_MAX_REQUEUES how often one job may be requeued; default 200
#   TRAINER_SWEEP        "mask_ratio 0.6 0.75 0.9": element i of a job array takes value i, in its own output_dir

# launch/ of a checkout, or trainer/launch/ of an installed wheel
commands=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
  echo "error: $*" >&2
  exit 2
}

prepare() {
  local name
  for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NTASKS SLURM_JOB_NUM_NODES; do
    [[ -n ${!name:-} ]] || refuse "$name is not set: submit with sbatch, or with tools/submit.py"
  done
  ((SLURM_NTASKS % SLURM_JOB_NUM_NODES == 0)) ||
    refuse "$SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes: ask for --ntasks-per-node, as many as GPUs of a node"
  cd "$TRAINER_HOME" || refuse "TRAINER_HOME is $TRAINER_HOME, which this node does not see: name a shared folder"
  if [[ -n ${TRAINER_ENVIRONMENT:-} ]]; then
    [[ -r $TRAINER_ENVIRONMENT ]] || refuse "TRAINER_ENVIRONMENT is $TRAINER_ENVIRONMENT, which is no file here"
    # shellcheck source=/dev/null
    source "$TRAINER_ENVIRONMENT"
  fi
  if [[ -z ${TRAINER_PYTHON:-} ]]; then
    TRAINER_PYTHON=python
    [[ ! -x .venv/bin/python ]] || TRAINER_PYTHON=$PWD/.venv/bin/python
  fi
  command -v "$TRAINER_PYTHON" > /dev/null || refuse "TRAINER_PYTHON is $TRAINER_PYTHON, which is no program here"
  export TRAINER_PYTHON
  # A requeued job gets another port, because a rank on a node that was cut off may still listen on the old one. Job 1000
  # gets 15000 + 7000 = 22000, its first requeue 22001. All are below the range of ports that the kernel assigns itself.
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((15000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 15000))
  export MASTER_ADDR MASTER_PORT
  this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
  export NO_ALBUMENTATIONS_UPDATE=1 PYTHONUNBUFFERED=1
  echo "=== $(date '+%F %T') job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)):" \
    "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"
}

# Sets `argv`: the flags of the job, and for an element of a job array its value of the sweep and its own output_dir.
# With TRAINER_SWEEP="mask_ratio 0.6 0.75", element 1 turns `--output_dir runs/s` into
# `--output_dir runs/s/mask_ratio-0.75 --mask_ratio 0.75`.
set_argv() {
  argv=("$@")
  [[ -n ${TRAINER_SWEEP:-} ]] || return 0
  local setting values index
  read -r setting values <<< "$TRAINER_SWEEP"
  read -ra values <<< "$values"
  index=${SLURM_ARRAY_TASK_ID:-}
  [[ $index =~ ^[0-9]+$ ]] || refuse "TRAINER_SWEEP is '$TRAINER_SWEEP', but this is no job array: submit with --array"
  ((index < ${#values[@]})) || refuse "array element $index, but TRAINER_SWEEP has ${#values[@]} values: fit --array"
  local position
  for position in "${!argv[@]}"; do
    case ${argv[position]} in
      --output_dir) argv[position + 1]+="/$setting-${values[index]}" ;;
      --output_dir=*) argv[position]+="/$setting-${values[index]}" ;;
      "--$setting" | "--$setting="*) refuse "$setting is given twice, in TRAINER_SWEEP and as --$setting: keep one" ;;
    esac
  done
  argv+=("--$setting" "${values[index]}")
}

# Runs a command of launch/ as one task a GPU and waits. srun runs in the background, because bash runs its traps only
# between commands, and would handle no signal while srun is in the foreground.
on_all_ranks() {
  local code=0 step program=("launch/$1.py")
  [[ ! -f $commands/../__init__.py ]] || program=(-P -m "trainer.launch.$1") # an installed wheel
  shift
  # All tasks of a node see all its GPUs, and each uses the one of its number. Since SLURM 22.05 a step does not inherit
  # the number of cores of a task.
  SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} srun --kill-on-bad-exit=1 --unbuffered --gpu-bind=none \
    bash "$commands/slurm/rank.sh" "${program[@]}" "$@" &
  step=$!
  while true; do
    interrupted=''
    wait "$step" && code=0 || code=$?
    if [[ -z $interrupted ]] || ((code <= 128)); then break; fi # otherwise a signal ended the wait, not the step
  done
  return "$code"
}

stop_requested='' job_ends='' interrupted=''
on_usr1() {
  stop_requested=yes interrupted=yes
  echo "$(date '+%F %T') the time is almost up: asking the ranks to save"
  scancel --signal=USR1 "$this_job" # without --batch: the steps only
}
on_term() { job_ends=yes interrupted=yes; } # the ranks get the signal themselves, and SLURM decides about the requeue

# Trains until the end of the schedule or of the job's time, and requeues the job if that helps.
train() {
  local script=$1 code=0
  shift
  set_argv "$@"
  trap on_usr1 USR1
  trap on_term TERM
  if [[ ${TRAINER_DOCTOR:-1} != 0 ]]; then
    on_all_ranks doctor --script "$script" "${argv[@]}" || code=$?
    ((code == 0)) || [[ -n $stop_requested$job_ends ]] || { echo "not started: see the lines above"; exit "$code"; }
  fi
  if [[ -z $stop_requested$job_ends ]]; then
    code=0
    on_all_ranks "$script" "${argv[@]}" || code=$?
  fi
  echo "=== $(date '+%F %T') job $SLURM_JOB_ID ends with $code"
  case $code in
    0 | 2 | 87) exit "$code" ;; # done; an error that the user must fix; a newer attempt has taken over
  esac
  [[ -z $job_ends ]] || exit "$code"
  ((${SLURM_RESTART_COUNT:-0} < ${TRAINER_MAX_REQUEUES:-200})) ||
    { echo "not queued again: TRAINER_MAX_REQUEUES is ${TRAINER_MAX_REQUEUES:-200}"; exit "$code"; }
  # 85: saved, the time is up. Any other code: a rank or its host was lost. --max_restarts ends a run without progress.
  scontrol requeue "$this_job"
  sleep 60 # SLURM ends this shell when it requeues the job
  exit "$code"
}
