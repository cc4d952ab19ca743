#!/usr/bin/env bash
# A real SLURM of two nodes on this one machine, for tests/cluster/preempted.sh. Needs root and Debian.
#   two_node_slurm.sh start FOLDER   install what is missing, start the daemons: nodes n1 and n2 of a core each
#   two_node_slurm.sh stop FOLDER    end them
set -euo pipefail
action=${1:?start or stop}
folder=${2:?a folder for the daemons\' state}
host=$(hostname)

start() {
  if ! command -v slurmctld >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge
  fi
  pgrep -x munged >/dev/null || service munge start
  mkdir -p "$folder"/{state,n1,n2} /etc/slurm
  grep -q ' n1 n2' /etc/hosts || echo '127.0.0.1 n1 n2' >>/etc/hosts
  cat >/etc/slurm/slurm.conf <<CONF
ClusterName=owl
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=60
MinJobAge=3600
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=8000 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
  slurmctld
  slurmd -N n1
  slurmd -N n2
  sleep 3
  sinfo
}

stop() {
  for daemon in n1 n2 slurmctld; do
    if [ -f "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" || true; fi
  done
}

"$action"
