# The dirtier: a boot sector that writes one byte in every 4 KiB page of a range, for ever.
#
# What it promises, from the moment when the started marker is set:
#   - Round n adds 1 to byte 0 of every page of [first, last), in ascending order, one instruction a page. So at any
#     moment when the processor is stopped, walking up, those bytes are equal, except that at one place at most the value
#     drops by exactly 1 (mod 256).
#   - The counter holds the rounds completed. Pages below that place hold counter + 1, the others counter (mod 256). The
#     two agree to the instruction: only between a round's last page and its count do all pages hold counter + 1.
#   - COM1 gets 'A' once, then 'B' after each round is counted.
#   - The sector's own page is never written.
#
# sector.inc says how it starts and what is where; src/dirtylog/guests/dirtier.py holds the same numbers.

        .include "sector.inc"

# Pages per turn of the inner loop, a power of two. Where a hypervisor emulates each instruction, instructions per page
# are the speed: 32 pages in 34 instructions. Twice as many would not fit.
        .set    UNROLL,         32
        .set    STEP_SIZE,      7               # bytes of one unrolled instruction, held to below

        begin_sector "DLP1"
        enter_protected_mode
        start_afresh

# A page's address is kept as EBX + EAX, with EBX = last and EAX counting up to 0, so that ADD's own flags end the loop.
# A turn covers UNROLL pages. The first turn of a round is the short one when the range is not a multiple of that: it
# begins inside the loop, at the instruction for `first`.
#   ESI = EAX at the start of a round = -(size rounded up to whole turns)
#   EDI = where to enter the loop
        movl    first, %esi
        subl    %ebx, %esi                      # -size
        movl    %esi, %edi
        andl    $-(UNROLL * PAGE), %esi
        subl    %esi, %edi                      # bytes of the first turn to leave out
        shrl    $12, %edi
        imull   $STEP_SIZE, %edi, %edi
        addl    $turn, %edi

        announce

round:
        movl    %esi, %eax
        jmp     *%edi

# One instruction reads, adds and writes: a stopped processor is before it or after it. {disp32} keeps the first step,
# whose displacement is 0, as long as the others.
turn:
        .set    displacement, 0
        .rept   UNROLL
        {disp32} incb displacement(%ebx, %eax)
        .set    displacement, displacement + PAGE
        .endr
turn_end:
        .if     (turn_end - turn) - UNROLL * STEP_SIZE
        .error  "an unrolled step is not STEP_SIZE bytes long"
        .endif
        addl    $(UNROLL * PAGE), %eax
        jnz     turn

        addl    $1, COUNTER
        adcl    $0, COUNTER + 4
        movb    $'B', %al
        outb    %al, %dx
        jmp     round

        end_sector
