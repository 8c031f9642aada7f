#!/usr/bin/env bash
# Sourced by the launch scripts: arguments are checked first, and --dry_run prints every command instead of running it.

DRY_RUN=false
REST=() # what the script does not know goes to scl_jax.main as it is
TRAIN=(python -m scl_jax.main)
# shellcheck disable=SC2034  # the scripts use it
[[ ! -x .venv/bin/python ]] || TRAIN[0]=.venv/bin/python # as launch/test.sh and launch/quickstart.sh make it

die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

show_header() { # what a script says of itself in its first lines
  sed -n '2,/^set /s/^# //p' "launch/$(basename "$0")"
  exit
}

parse_arguments() { # parse_arguments "name name …" ARGUMENT...: --name=value sets the variable of that name
  local known=" $1 " option
  shift
  while (($#)); do
    option=${1#--}
    option=${option%%=*}
    if [[ $1 == --help || $1 == -h ]]; then
      show_header
    elif [[ $1 == --dry_run ]]; then
      DRY_RUN=true
    elif [[ $1 == --?*=* && $known == *" $option "* ]]; then
      printf -v "$option" '%s' "${1#*=}"
    elif [[ $1 == --?* && $known != *" $option "* ]]; then
      REST+=("$1")
    else
      die "what is $1? Options are written --name=value; known here:$known--dry_run, and those of scl_jax.main"
    fi
    shift
  done
}

require() { # require NAME MEANING: the option must have been given
  [[ -n ${!1:-} ]] || die "--$1=… is missing: $2"
}

require_match() { # require_match NAME PATTERN MEANING: an extended regular expression for the whole value
  [[ ${!1:-} =~ ^($2)$ ]] || die "--$1=${!1:-} is not $3"
}

require_config() { # the config must be a file of this repository; what follows a colon is its argument
  require config "the config file, such as configs/pretrain_image.py"
  # shellcheck disable=SC2154  # set by parse_arguments
  [[ -f ${config%%:*} ]] || die "--config=$config: there is no such file in $PWD"
  require workdir "where checkpoints and logs go; all hosts must see the same folder"
}

run() { # runs a command, or prints it so that it can be pasted
  if $DRY_RUN; then
    printf '%q ' "$@" | sed 's/ $/\n/'
  else
    "$@"
  fi
}
