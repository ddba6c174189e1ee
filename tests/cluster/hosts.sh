#!/usr/bin/env bash
# A cluster on one machine, for tests. Each host has its own network, host name, process table and /dev/shm, and an sshd
# that takes keys only; the file system is shared, as on a cluster with one NFS. Nothing is added to the machine's own
# network. Needs root, and Debian's iproute2 openssh-server util-linux; for `slurm` slurmctld slurmd slurm-client munge.
#
#   hosts.sh up | down | slurm         start the hosts in $HOSTS; end them; run SLURM on them (slurmctld on "head")
#   hosts.sh on HOST COMMAND...        run a command there, from / and with full paths
#   hosts.sh cut HOST | heal HOST      pull the cable: packets vanish without an answer; put it back
#   hosts.sh crash HOST                every process of the host dies at once
#
# Environment: LAB, a short name that keeps two labs apart; DIR, a folder; HOSTS="hosta hostb"; NET=10.77.0
set -euo pipefail
LAB=${LAB:-mae} DIR=${DIR:?a folder} NET=${NET:-10.77.0}
read -ra hosts <<< "${HOSTS:-hosta hostb}"
self=$(readlink -f "$0")
slurm=$DIR/slurm

# Process 1 of a host. It reaps what is left behind and dies only by SIGKILL from outside, as in a power cut.
init() {
  local host=$1
  hostname "$host"
  mount --make-rprivate /
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -m 755 /run/sshd
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mount --bind "$DIR/hosts" /etc/hosts
  mount --bind "$DIR/ssh_config" /etc/ssh/ssh_config
  [ ! -e ~root/.bashrc ] || mount --bind /dev/null ~root/.bashrc # bash reads it under ssh, whatever it does here
  /usr/sbin/sshd -D -f "$DIR/sshd_config" -o "ListenAddress=$(address "$host")" -E "$DIR/log/sshd.$host.log" &
  while true; do wait -n || sleep 0.2; done
}

address() { awk -v host="$1" '$2 == host { print $1 }' "$DIR/hosts"; }
port_of() { awk -v host="$1" '$2 == host { print "p" NR - 1 }' "$DIR/hosts"; }
on() { nsenter --target "$(cat "$DIR/run/$1.pid")" --all -- "${@:2}"; }

write_ssh() {
  [ -s "$DIR/keys/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/keys/id" -C lab
  [ -s "$DIR/keys/host" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/keys/host" -C host
  install -m 600 "$DIR/keys/id.pub" "$DIR/keys/authorized_keys"
  sed "s/^/$(IFS=, && echo "${hosts[*]}") /" "$DIR/keys/host.pub" > "$DIR/known_hosts"
  cat > "$DIR/sshd_config" << CONFIG
Port 22
HostKey $DIR/keys/host
AuthorizedKeysFile $DIR/keys/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
PrintMotd no
CONFIG
  cat > "$DIR/ssh_config" << CONFIG
Host ${hosts[*]}
  IdentityFile $DIR/keys/id
  IdentitiesOnly yes
  UserKnownHostsFile $DIR/known_hosts
  StrictHostKeyChecking yes
  ConnectTimeout 10
  ServerAliveInterval 5
  ServerAliveCountMax 3
  LogLevel ERROR
CONFIG
}

up() {
  down
  install -d -m 755 "$DIR" "$DIR/log" "$DIR/run"
  install -d -m 700 "$DIR/keys"
  write_ssh
  local number=0 host pid child
  echo "127.0.0.1 localhost" > "$DIR/hosts"
  for host in "${hosts[@]}"; do
    number=$((number + 1))
    echo "$NET.$number $host" >> "$DIR/hosts"
  done
  ip netns add "$LAB-switch"
  ip -n "$LAB-switch" link add br0 type bridge
  ip -n "$LAB-switch" link set br0 up
  for host in "${hosts[@]}"; do
    ip netns add "$LAB-$host"
    ip -n "$LAB-$host" link set lo up
    ip -n "$LAB-switch" link add "$(port_of "$host")" type veth peer name eth0 netns "$LAB-$host"
    ip -n "$LAB-switch" link set "$(port_of "$host")" master br0 up
    ip -n "$LAB-$host" addr add "$(address "$host")/24" dev eth0
    ip -n "$LAB-$host" link set eth0 up
    export DIR
    setsid ip netns exec "$LAB-$host" unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc \
      bash "$self" _init "$host" > "$DIR/log/init.$host.log" 2>&1 < /dev/null &
    pid=$! child=''
    until [ -n "$child" ]; do
      read -r child _ 2> /dev/null < "/proc/$pid/task/$pid/children" || true # the line has no end, so read says 1
      sleep 0.02
    done
    echo "$child" > "$DIR/run/$host.pid"
  done
  for host in "${hosts[@]}"; do
    for number in {1..100}; do
      on "${hosts[0]}" ssh "$host" true 2> /dev/null && break
      [ "$number" -lt 100 ] || { tail "$DIR"/log/* >&2; exit 1; }
      sleep 0.05
    done
  done
  echo "up: ${hosts[*]}"
}

down() {
  local file pid
  for file in "$DIR"/run/*.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    if tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -q "hosts.sh _init"; then kill -KILL "$pid" || true; fi
    rm -f "$file"
  done
  for file in "${hosts[@]}" switch; do ip netns del "$LAB-$file" 2> /dev/null || true; done
}

# Seconds are short, so that tests are: a requeued job waits for cred_expire (120 as installed), a silent node is given
# up after SlurmdTimeout (300), and what is told to end has KillWait (30) before SIGKILL.
write_slurm() {
  local host
  cat > "$slurm/slurm.conf" << CONFIG
ClusterName=lab
SlurmctldHost=head($(address head))
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$slurm/run/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=200000,sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPidFile=$slurm/run/slurmctld.pid
SlurmdPidFile=$slurm/run/slurmd.%n.pid
StateSaveLocation=$slurm/state
SlurmdSpoolDir=$slurm/spool.%n
SlurmctldLogFile=$slurm/log/slurmctld.log
SlurmdLogFile=$slurm/log/slurmd.%n.log
KillWait=20
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONFIG
  # A GPU is a device file to SLURM. The first host is taken first.
  for host in "${hosts[@]}"; do
    [ "$host" != head ] || continue
    echo "NodeName=$host NodeAddr=$(address "$host") CPUs=4 RealMemory=4000 Gres=gpu:2" \
      "Weight=$(address "$host" | cut -d . -f 4) State=UNKNOWN"
    echo "NodeName=$host Name=gpu File=/dev/tty1,/dev/tty2" >> "$slurm/gres.conf"
  done >> "$slurm/slurm.conf"
  cat >> "$slurm/slurm.conf" << CONFIG
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONFIG
  echo 'CgroupPlugin=cgroup/v1' > "$slurm/cgroup.conf" # named, it is not used; looking for one fails in such a host
}

slurm() {
  local host number
  rm -rf "$slurm"
  install -d -m 755 "$slurm" "$slurm/run" "$slurm/log" "$slurm/state"
  install -d -m 700 "$slurm/etc"
  (umask 077 && head -c 128 /dev/urandom > "$slurm/etc/munge.key")
  write_slurm
  # One munged serves all: its socket lies in the shared file system.
  on head munged --force --key-file="$slurm/etc/munge.key" --socket="$slurm/run/munge.socket" --num-threads=2 \
    --pid-file="$slurm/run/munged.pid" --log-file="$slurm/log/munged.log" --seed-file="$slurm/etc/munged.seed"
  on head slurmctld -c -f "$slurm/slurm.conf"
  for host in "${hosts[@]}"; do
    [ "$host" != head ] || continue
    install -d "$slurm/spool.$host"
    on "$host" slurmd -f "$slurm/slurm.conf"
  done
  for number in {1..300}; do
    idle=$(on head env SLURM_CONF="$slurm/slurm.conf" sinfo -h -N -o '%N %t' 2> /dev/null | sort -u | grep -c ' idle$') ||
      true
    [ "$idle" != $((${#hosts[@]} - 1)) ] || { echo "slurm is up after $number polls"; return; }
    sleep 0.1
  done
  tail -n 20 "$slurm"/log/*.log >&2
  exit 1
}

case ${1:?} in
  up | down | slurm) "$1" ;;
  _init) init "$2" ;;
  on) on "${@:2}" ;;
  cut) ip -n "$LAB-switch" link set "$(port_of "$2")" down ;;
  heal) ip -n "$LAB-switch" link set "$(port_of "$2")" up ;;
  crash) kill -KILL "$(cat "$DIR/run/$2.pid")" ;;
esac
