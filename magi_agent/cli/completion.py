"""``magictl completion``: the script by which a shell completes what is typed for ``magictl``.

click does the work; its scripts for bash and zsh leave a blank behind every word that they complete, which is wrong
behind ``KEY=``, and bash takes words apart at each ``=`` and ``:``. So the two have scripts of ours.
"""

from typing import Any, Literal

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from magi_agent.cli.command import command
from magi_agent.cli.options import Session

_PROGRAM = "magictl"
_BREAKS = frozenset({"=", ":"})
"""Where bash takes words apart (its COMP_WORDBREAKS); no id and no name has these in it."""

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' kind word
    COMPREPLY=()
    while IFS=, read -r kind word; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$word")
                [[ $word == *= ]] && compopt -o nospace
                ;;
        esac
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a answer plain described open
    local kind word what
    (( $+commands[%(prog_name)s] )) || return 1
    answer=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s 2>/dev/null)}")
    for kind word what in "${answer[@]}"; do
        case $kind in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain)
                if [[ $word == *= ]]; then
                    open+=("$word")
                elif [[ $what == _ ]]; then
                    plain+=("$word")
                else
                    described+=("$word:$what")
                fi
                ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#plain )) && compadd -U -V unsorted -a plain
    (( $#open )) && compadd -U -S '' -V unsorted -a open
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


class _Bash(BashComplete):
    """bash, which hands ``KEY=VALUE`` over as three words, and replaces only the last of them."""

    source_template = _BASH

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one being completed, and that one, put together again."""
        words, incomplete = super().get_completion_args()
        if incomplete == "=" and words:
            self._kept = f"{words.pop()}="
            incomplete = ""
        elif len(words) > 1 and words[-1] == "=":
            self._kept = f"{words[-2]}="
            del words[-2:]
        joined: list[str] = []
        for word in words:
            if joined and (word in _BREAKS or joined[-1][-1:] in _BREAKS):
                joined[-1] += word
            else:
                joined.append(word)
        return joined, self._kept + incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return an item without what bash keeps."""
        return f"{item.type},{str(item.value).removeprefix(self._kept)}"


class _Zsh(ZshComplete):
    """zsh."""

    source_template = _ZSH


def register() -> None:
    """Have click answer bash and zsh in our way."""
    add_completion_class(_Bash)
    add_completion_class(_Zsh)


@command(
    "source <(magictl completion bash)     # in ~/.bashrc",
    "source <(magictl completion zsh)      # in ~/.zshrc, behind compinit",
    "magictl completion fish > ~/.config/fish/completions/magictl.fish",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(session: Session, shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the script that completes commands in your shell.

    Model ids and profile names are asked of the agent; where it is not reachable, they are not offered.
    With --json: the script as the value of "script".
    """
    from magi_agent.cli.magictl import A_SHELL_ASKS, command_line

    register()
    chosen = get_completion_class(shell)
    script = chosen(command_line, {}, _PROGRAM, A_SHELL_ASKS).source()
    if session.screen.as_json:
        session.screen.json({"shell": shell, "script": script})
        return
    session.screen.text(script)
