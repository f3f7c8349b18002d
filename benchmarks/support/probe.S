# The probe: writes pages at random as guests/random_writer.S does, and notes how long each write takes that takes long.
#
# What it promises, from the moment when the started marker is set: what the random writer promises of pages and counter;
# and that LOG holds how many writes took THRESHOLD ticks of the time stamp counter or more, and after that for how many
# ticks each did, in their order, as far as there is room. Ticks are modulo 2^32.

        .include "sector.inc"

        .set    MULTIPLIER,     1664525
        .set    INCREMENT,      1013904223

        .set    LOG,            0x10000         # u32, and then a u32 for each
        .set    MOST,           0x1a000         # up to 0x78004, below what a BIOS keeps for itself
        .set    THRESHOLD,      10000

        begin_sector "DLQ1"
seed:   .long   1
        enter_protected_mode
        start_afresh

        movl    seed, %esi
        movl    %ebx, %ebp
        movl    first, %ebx
        subl    %ebx, %ebp
        shrl    $12, %ebp                       # pages
        movl    %eax, LOG

        announce

write:
        imull   $MULTIPLIER, %esi, %esi
        addl    $INCREMENT, %esi
        movl    %esi, %eax
        mull    %ebp                            # EDX = (x * pages) >> 32
        shll    $12, %edx
        movl    %edx, %ecx
        rdtsc
        movl    %eax, %edi
        incb    (%ebx, %ecx)
        rdtsc
        subl    %edi, %eax
        addl    $1, COUNTER
        adcl    $0, COUNTER + 4
        cmpl    $THRESHOLD, %eax
        jb      write
        movl    LOG, %edx
        cmpl    $MOST, %edx
        jae     write
        movl    %eax, LOG + 4(, %edx, 4)
        incl    LOG
        jmp     write

        end_sector
