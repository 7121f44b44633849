#!/usr/bin/env bash
# CanineTokenizer gives both texts of a pair the type 0 since transformers 5; up to 4.57 the second one had type 1.
#
# Models fine-tuned on pairs (question answering, entailment) were trained with 0 and 1, and the second embedding is in their
# checkpoints; with the newer tokenizer it is never read, and answers change without a word.
# Seen: 4.57.6 gives [0, 0, 0, 0, 1, 1, 1], 5.24.0 gives [0, 0, 0, 0, 0, 0, 0] for the pair ("ab", "cd").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
types() {
  ${PYTHON:-python3} -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet "transformers==$1"
  "$folder/$1/bin/python" -c 'from transformers import CanineTokenizer; print(CanineTokenizer()("ab", "cd")["token_type_ids"])' 2>/dev/null
}
old=$(types 4.57.6)
new=$(types 5.24.0)
echo "4.57.6: $old"
echo "5.24.0: $new"
[ "$old" = "[0, 0, 0, 0, 1, 1, 1]" ] && [ "$new" = "[0, 0, 0, 0, 0, 0, 0]" ] || { echo "transformers behaves otherwise now"; exit 1; }
