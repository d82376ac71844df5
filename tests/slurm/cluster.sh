#!/usr/bin/env bash
# A real Slurm with N virtual nodes on one machine, all of it in one folder. Needs root, and Debian's
# slurmctld slurmd slurm-client munge.
#
#   cluster.sh up FOLDER N          start it; returns when all nodes n1 to nN are idle
#   cluster.sh down FOLDER          end all of it, by process id; the folder stays, for its logs
#   cluster.sh kill-node FOLDER I   a node crashes, with all its processes
#   cluster.sh start-node FOLDER I  and boots
#   cluster.sh on-node FOLDER I COMMAND...   run a command that sees the node's file systems
#   cluster.sh kill-controller FOLDER | start-controller FOLDER   slurmctld dies, and comes back to the state it saved
#
# Commands find the cluster by SLURM_CONF=FOLDER/slurm.conf. Of each node: CPUS (8), GPUS (1, devices in name only),
# MEMORY_MB (4000), from the environment.
set -euo pipefail

verb=${1:?a verb: see above} folder=${2:?the folder of the cluster}
shift 2
mkdir -p "$folder"
folder=$(cd "$folder" && pwd -P)
export SLURM_CONF=$folder/slurm.conf
PATH=$PATH:/usr/sbin # where the daemons are

die() { echo "cluster.sh: $*" >&2; exit 1; }

# Processes are known by id and start time, as ids are used again. A zombie is gone: nobody may be there to reap it.
start_time_of() { sed -n 's/.*) \([^Z]\) /\1 /p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

pid_of() { local pid started; read -r pid started <"$folder/run/$1.pid"; echo "$pid"; }

alive() {
  [ -f "$folder/run/$1.pid" ] || return 1
  local pid started
  read -r pid started <"$folder/run/$1.pid"
  [ -n "$started" ] && [ "$(start_time_of "$pid")" = "$started" ]
}

spawn() { # name command...: in a session of its own, with nothing inherited that a caller would wait for
  local name=$1; shift
  setsid "$@" </dev/null >>"$folder/log/$name.out" 2>&1 3>&- 4>&- 9>&- &
  echo "$! $(start_time_of $!)" >"$folder/run/$name.pid"
}

end() { # name signal, and SIGKILL after three seconds
  if alive "$1"; then
    local pid i; pid=$(pid_of "$1")
    kill "-$2" "$pid" 2>/dev/null || true
    for i in $(seq 100); do
      alive "$1" || break
      [ "$i" != 60 ] || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.05
    done
  fi
  rm -f "$folder/run/$1.pid"
}

start_node() { # in its own pid, mount and host-name namespaces: they end with the process that made them
  spawn "n$1" unshare --mount --uts --pid --fork --kill-child=KILL --mount-proc -- bash -c '
    mount --bind "$1/hosts" /etc/hosts; hostname "$2"; slurmd -D -N "$2" & wait' node "$folder" "n$1"
}

free_ports() { # count: the first of so many free ones in a row, below those that the kernel gives to anyone
  python3 - "$1" <<'PY'
import random, socket, sys
from contextlib import ExitStack, suppress
count = int(sys.argv[1])
for _ in range(200):
    first = random.randrange(20000, 30000)
    with suppress(OSError), ExitStack() as held:
        for port in range(first, first + count):
            held.enter_context(socket.socket()).bind(("0.0.0.0", port))
        print(first)
        break
PY
}

write_conf() { # nodes first_port
  local cpus=${CPUS:-8} gpus=${GPUS:-1} memory_mb=${MEMORY_MB:-4000} gres='' i
  : >"$folder/gres.conf"
  for i in $(seq 0 $((gpus - 1))); do # Slurm only looks whether there is a device of that name
    mknod "$folder/dev/nvidia$i" c 1 3
    echo "Name=gpu File=$folder/dev/nvidia$i" >>"$folder/gres.conf"
    gres="Gres=gpu:$gpus"
  done
  cat >"$SLURM_CONF" <<CONF
ClusterName=virtual
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$2
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits as long as its credential holds, 120 s by default.
AuthInfo=socket=$folder/run/munge.s,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.own.pid
SlurmdPidFile=$folder/run/slurmd.%n.own.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
MpiDefault=none
# Clusters may be up side by side. A job's processes are found by its number, and its folder in /tmp bears it.
FirstJobId=$(($2 * 100))
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=1
# A crashed node is found out half a minute later; one that is merely slow to answer is left alone.
SlurmdTimeout=10
SlurmctldTimeout=10
# A message that a busy node answers late would be sent again a minute later. One that ends a step would then meet the
# requeued job, whose steps have the same numbers; with the waiting time of other clusters (see cred_expire) it would not.
MessageTimeout=60
TCPTimeout=10
# Between SIGTERM and SIGKILL: a step and a save fit, on two busy cores.
KillWait=30
OverTimeLimit=0
InactiveLimit=0
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
CONF
  for i in $(seq "$1"); do
    echo "NodeName=n$i NodeAddr=127.0.1.$i Port=$(($2 + i)) CPUs=$cpus RealMemory=$memory_mb $gres State=UNKNOWN"
  done >>"$SLURM_CONF"
}

up() { # nodes
  local i name
  [ "$(id -u)" = 0 ] || die "must be root"
  for name in slurmctld slurmd sbatch munged unshare; do command -v "$name" >/dev/null || die "$name is not installed"; done
  unshare --mount --uts --pid --fork --mount-proc true || die "no right to make namespaces (CAP_SYS_ADMIN)"
  [ ${#folder} -lt 80 ] || die "$folder is too long a path for a unix socket"
  ! alive controller || die "already up in $folder"
  rm -rf "$folder"/{run,log,state,spool,etc,dev,jobcomp.txt}
  mkdir -p "$folder"/{run,log,state,spool,etc,dev}
  chmod 755 "$folder" "$folder"/*/
  ( umask 077; head -c 128 /dev/urandom >"$folder/etc/munge.key" )
  { cat /etc/hosts; for i in $(seq "$1"); do echo "127.0.1.$i n$i"; done; } >"$folder/hosts"
  write_conf "$1" "$(free_ports $(($1 + 1)))"
  trap '[ $? = 0 ] || { tail -n 5 "$folder"/log/* >&2; down; }' EXIT
  # --force: that others may write to a parent of its folders is a warning then.
  spawn munged munged --foreground --force --num-threads=2 --key-file="$folder/etc/munge.key" \
    --socket="$folder/run/munge.s" --pid-file="$folder/run/munged.own.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/etc/munge.seed"
  for i in $(seq 200); do [ ! -S "$folder/run/munge.s" ] || break; alive munged || die "munged died"; sleep 0.05; done
  spawn controller slurmctld -D -i
  for i in $(seq "$1"); do start_node "$i"; done
  SECONDS=0
  while [ $SECONDS -lt 60 ]; do
    alive controller && alive munged || die "a daemon died" # looked at first: without them sinfo hangs for minutes
    [ "$(timeout 5 sinfo -h -N -p main -t idle -o %n 2>/dev/null | wc -l)" != "$1" ] || return 0
    sleep 0.1
  done
  timeout 5 sinfo -N -l >&2 || true
  die "the nodes are not idle after 60 s"
}

down() { # nodes first: SIGKILL to a node's first process takes all the others along
  local file
  [ -d "$folder/run" ] || return 0
  for file in "$folder"/run/n[0-9]*.pid; do [ ! -e "$file" ] || end "$(basename "$file" .pid)" KILL; done
  end controller TERM
  end munged TERM
  rm -f "$folder/run/munge.s"*
}

case $verb in
  up) up "${1:?how many nodes}" ;;
  down) down ;;
  kill-node) end "n${1:?which node}" KILL ;;
  start-node) ! alive "n${1:?which node}" || die "n$1 is up"; start_node "$1" ;;
  on-node) node=$1; shift; exec nsenter --target "$(pid_of "n$node")" --mount --uts -- "$@" ;;
  kill-controller) end controller KILL ;;
  start-controller) ! alive controller || die "slurmctld is up"; spawn controller slurmctld -D ;;
  *) die "$verb is no verb: up, down, kill-node, start-node, on-node, kill-controller, start-controller" ;;
esac
