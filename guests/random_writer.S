# The random writer: a boot sector that writes one byte in a random 4 KiB page of a range, for ever.
#
# What it promises, from the moment when the started marker is set:
#   - Write n adds 1 to byte 0 of page (x(n) * pages) >> 32 of [first, last), one instruction a write, where x(0) is the
#     seed and x(n) = (1664525 * x(n - 1) + 1013904223) mod 2^32. Each x comes once in 2^32 writes. So which pages were
#     written, and how often, follows from the number of writes.
#   - The counter holds the writes made. Only between a write and its count has one more been made than it says; and, as
#     the counter is added to in two halves, only right after each 2^32nd write may it be read 2^32 too low.
#   - COM1 gets 'A' once.
#   - The sector's own page is never written.
#
# sector.inc says how it starts and what is where; src/dirtylog/guests/random_writer.py holds the same numbers. One more
# parameter follows the others:
#
#   0x7c10  u32      seed

        .include "sector.inc"

# From Numerical Recipes: a full period, and high bits that are fit for this. The page number is made of those alone.
        .set    MULTIPLIER,     1664525
        .set    INCREMENT,      1013904223

        begin_sector "DLR1"
seed:   .long   1
        enter_protected_mode
        start_afresh

        movl    seed, %esi
        movl    %ebx, %ebp
        movl    first, %ebx
        subl    %ebx, %ebp
        shrl    $12, %ebp                       # pages

        announce

write:
        imull   $MULTIPLIER, %esi, %esi
        addl    $INCREMENT, %esi
        movl    %esi, %eax
        mull    %ebp                            # EDX = (x * pages) >> 32
        shll    $12, %edx
# One instruction reads, adds and writes: a stopped processor is before it or after it.
        incb    (%ebx, %edx)
        addl    $1, COUNTER
        adcl    $0, COUNTER + 4
        jmp     write

        end_sector
