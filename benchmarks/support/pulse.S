# The pulse: writes memory as guests/dirtier.S does, and tells of every 32nd page on the serial port.
#
# What it promises, from the moment when the started marker is set: what the dirtier promises of pages and counter; and
# that COM1 gets 'A' once, and after each turn, of UNROLL pages or of those that are over, the next character, mod 256.
# So two characters that are one apart are two pulses with none between them.

        .include "sector.inc"

        .set    UNROLL,         32
        .set    STEP_SIZE,      7               # bytes of one unrolled instruction, held to below

        begin_sector "DLB1"
        enter_protected_mode
        start_afresh

# As in the dirtier, but with ECX for EAX, whose low byte is the next character. A page's address is EBX + ECX.
#   ESI = ECX at the start of a round = -(size rounded up to whole turns)
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
        movl    %esi, %ecx
        jmp     *%edi

turn:
        .set    displacement, 0
        .rept   UNROLL
        {disp32} incb displacement(%ebx, %ecx)
        .set    displacement, displacement + PAGE
        .endr
turn_end:
        .if     (turn_end - turn) - UNROLL * STEP_SIZE
        .error  "an unrolled step is not STEP_SIZE bytes long"
        .endif
        incl    %eax
        outb    %al, %dx
        addl    $(UNROLL * PAGE), %ecx
        jnz     turn

        addl    $1, COUNTER
        adcl    $0, COUNTER + 4
        jmp     round

        end_sector
