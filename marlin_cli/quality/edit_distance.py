"""Levenshtein distance, a column of the table at a time as the bits of integers."""


def edit_distance(found: str, wanted: str) -> int:
    """Fewest insertions, deletions and substitutions of code points that turn one string into the other.

    Differences of neighbouring cells are -1, 0 or 1, so a column is two bit vectors, and Python's integers are as long
    as the string (Myers, J. ACM 46(3), 1999; for whole strings Hyyro, 2003).
    """
    while found and wanted and found[-1] == wanted[-1]:
        found, wanted = found[:-1], wanted[:-1]
    if not found or not wanted:
        return len(found) + len(wanted)
    places: dict[str, int] = {}
    for index, letter in enumerate(wanted):
        places[letter] = places.get(letter, 0) | 1 << index
    everywhere, last = (1 << len(wanted)) - 1, 1 << len(wanted) - 1
    more, less = everywhere, 0  # rows that are one more, and one less, than the row above
    distance = len(wanted)
    for letter in found:
        same = places.get(letter, 0)
        diagonal = (((same & more) + more) ^ more) | same | less
        across_more = less | ~(diagonal | more) & everywhere
        across_less = more & diagonal
        distance += bool(across_more & last) - bool(across_less & last)
        across_more = across_more << 1 | 1
        across_less <<= 1
        more = (across_less | ~(diagonal | across_more)) & everywhere
        less = across_more & diagonal & everywhere
    return distance
