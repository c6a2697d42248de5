;; The inner loops of engine.js with SIMD. Pointers are byte offsets into the memory. Vectors are float32
;; unless said otherwise; each begins at a multiple of 16 and is padded with zeros. Sizes are multiples of the
;; number in "(of 4)". wat2wasm compiles this file to kernel.wasm.
(module
  (import "page" "memory" (memory 1))

  ;; y = x_scale * scale * (w @ x). w: int8, rows (of 4) x columns (of 8); x: int16, columns
  (func (export "product")
    (param $w i32) (param $scale i32) (param $x i32) (param $x_scale f32) (param $y i32)
    (param $rows i32) (param $columns i32)
    (local $end i32) (local $w1 i32) (local $w2 i32) (local $w3 i32) (local $row_end i32) (local $at i32)
    (local $a0 v128) (local $a1 v128) (local $a2 v128) (local $a3 v128) (local $part v128)
    (local.set $end (i32.add (local.get $y) (i32.shl (local.get $rows) (i32.const 2))))
    (loop $four_rows
      (local.set $w1 (i32.add (local.get $w) (local.get $columns)))
      (local.set $w2 (i32.add (local.get $w1) (local.get $columns)))
      (local.set $w3 (i32.add (local.get $w2) (local.get $columns)))
      (local.set $row_end (local.get $w1))
      (local.set $at (local.get $x))
      (local.set $a0 (v128.const i32x4 0 0 0 0))
      (local.set $a1 (v128.const i32x4 0 0 0 0))
      (local.set $a2 (v128.const i32x4 0 0 0 0))
      (local.set $a3 (v128.const i32x4 0 0 0 0))
      (loop $eight_columns
        (local.set $part (v128.load (local.get $at)))
        (local.set $a0 (i32x4.add (local.get $a0)
          (i32x4.dot_i16x8_s (v128.load8x8_s (local.get $w)) (local.get $part))))
        (local.set $a1 (i32x4.add (local.get $a1)
          (i32x4.dot_i16x8_s (v128.load8x8_s (local.get $w1)) (local.get $part))))
        (local.set $a2 (i32x4.add (local.get $a2)
          (i32x4.dot_i16x8_s (v128.load8x8_s (local.get $w2)) (local.get $part))))
        (local.set $a3 (i32x4.add (local.get $a3)
          (i32x4.dot_i16x8_s (v128.load8x8_s (local.get $w3)) (local.get $part))))
        (local.set $at (i32.add (local.get $at) (i32.const 16)))
        (local.set $w1 (i32.add (local.get $w1) (i32.const 8)))
        (local.set $w2 (i32.add (local.get $w2) (i32.const 8)))
        (local.set $w3 (i32.add (local.get $w3) (i32.const 8)))
        (br_if $eight_columns (i32.lt_u
          (local.tee $w (i32.add (local.get $w) (i32.const 8))) (local.get $row_end))))
      (local.set $a0 (i32x4.add  ;; sum up each of the four rows: first two halves, then two quarters
        (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $a0) (local.get $a1))
        (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $a0) (local.get $a1))))
      (local.set $a2 (i32x4.add
        (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $a2) (local.get $a3))
        (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $a2) (local.get $a3))))
      (v128.store (local.get $y) (f32x4.mul
        (f32x4.mul (v128.load (local.get $scale)) (f32x4.splat (local.get $x_scale)))
        (f32x4.convert_i32x4_s (i32x4.add
          (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $a0) (local.get $a2))
          (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $a0) (local.get $a2))))))
      (local.set $w (local.get $w3))
      (local.set $scale (i32.add (local.get $scale) (i32.const 16)))
      (br_if $four_rows (i32.lt_u
        (local.tee $y (i32.add (local.get $y) (i32.const 16))) (local.get $end)))))

  ;; Returns the sum of four numbers
  (func $sum (param $x v128) (result f32)
    (f32.add
      (f32.add (f32x4.extract_lane 0 (local.get $x)) (f32x4.extract_lane 1 (local.get $x)))
      (f32.add (f32x4.extract_lane 2 (local.get $x)) (f32x4.extract_lane 3 (local.get $x)))))

  ;; Returns exp of four numbers, as powers of 2: the nearest integer goes into the bits of the exponent, the
  ;; rest into a polynomial with a relative error of at most 3e-7
  (func $exp (param $x v128) (result v128)
    (local $whole v128)
    (local.set $x (f32x4.mul (local.get $x) (f32x4.splat (f32.const 1.4426950408889634))))
    (local.set $x (f32x4.max (f32x4.splat (f32.const -126))
      (f32x4.min (f32x4.splat (f32.const 126)) (local.get $x))))
    (local.set $whole (f32x4.nearest (local.get $x)))
    (local.set $x (f32x4.sub (local.get $x) (local.get $whole)))
    (i32x4.add
      (i32x4.shl (i32x4.trunc_sat_f32x4_s (local.get $whole)) (i32.const 23))
      (f32x4.add (f32x4.splat (f32.const 1.0)) (f32x4.mul (local.get $x)
        (f32x4.add (f32x4.splat (f32.const 0.6931472)) (f32x4.mul (local.get $x)
          (f32x4.add (f32x4.splat (f32.const 0.24022651)) (f32x4.mul (local.get $x)
            (f32x4.add (f32x4.splat (f32.const 0.05550411)) (f32x4.mul (local.get $x)
              (f32x4.add (f32x4.splat (f32.const 0.009618129)) (f32x4.mul (local.get $x)
                (f32x4.splat (f32.const 0.0013333558))))))))))))))

  ;; out (int16) = x / scale, `count` (of 8) integers of at most `levels`; returns the scale
  (func (export "round") (param $x i32) (param $out i32) (param $count i32) (param $levels f32) (result f32)
    (local $end i32) (local $at i32) (local $most v128) (local $factor f32)
    (local.set $end (i32.add (local.get $x) (i32.shl (local.get $count) (i32.const 2))))
    (local.set $at (local.get $x))
    (loop $four
      (local.set $most (f32x4.max (local.get $most) (f32x4.abs (v128.load (local.get $at)))))
      (br_if $four (i32.lt_u
        (local.tee $at (i32.add (local.get $at) (i32.const 16))) (local.get $end))))
    (local.set $factor (f32.min (f32.const 1e30) (f32.div (local.get $levels) (f32.max  ;; 1e30 for zeros
      (f32.max (f32x4.extract_lane 0 (local.get $most)) (f32x4.extract_lane 1 (local.get $most)))
      (f32.max (f32x4.extract_lane 2 (local.get $most)) (f32x4.extract_lane 3 (local.get $most)))))))
    (loop $eight
      (v128.store (local.get $out) (i16x8.narrow_i32x4_s
        (i32x4.trunc_sat_f32x4_s (f32x4.nearest (f32x4.mul
          (v128.load (local.get $x)) (f32x4.splat (local.get $factor)))))
        (i32x4.trunc_sat_f32x4_s (f32x4.nearest (f32x4.mul
          (v128.load offset=16 (local.get $x)) (f32x4.splat (local.get $factor)))))))
      (local.set $out (i32.add (local.get $out) (i32.const 16)))
      (br_if $eight (i32.lt_u
        (local.tee $x (i32.add (local.get $x) (i32.const 32))) (local.get $end))))
    (f32.div (f32.const 1) (local.get $factor)))

  ;; out = gate / (1 + exp(-gate)) * up, `count` (of 4) numbers
  (func (export "gated") (param $gate i32) (param $up i32) (param $out i32) (param $count i32)
    (local $end i32)
    (local.set $end (i32.add (local.get $gate) (i32.shl (local.get $count) (i32.const 2))))
    (loop $four
      (v128.store (local.get $out) (f32x4.mul (v128.load (local.get $up)) (f32x4.div
        (v128.load (local.get $gate)) (f32x4.add (f32x4.splat (f32.const 1))
          (call $exp (f32x4.neg (v128.load (local.get $gate))))))))
      (local.set $up (i32.add (local.get $up) (i32.const 16)))
      (local.set $out (i32.add (local.get $out) (i32.const 16)))
      (br_if $four (i32.lt_u
        (local.tee $gate (i32.add (local.get $gate) (i32.const 16))) (local.get $end)))))

  ;; Attention of one head: out = sum over t of softmax(q . key[t]) value[t]. There are `count` keys and
  ;; values of `bytes` bytes, `stride` bytes apart. shares: room for `count` + 4 numbers
  (func (export "attend")
    (param $q i32) (param $key i32) (param $value i32) (param $shares i32) (param $out i32)
    (param $count i32) (param $stride i32) (param $bytes i32)
    (local $end i32) (local $at i32) (local $i i32) (local $from i32)
    (local $most f32) (local $score f32) (local $part v128) (local $sum v128)
    (local.set $end (i32.add (local.get $shares) (i32.shl (local.get $count) (i32.const 2))))
    (local.set $most (f32.const -inf))
    (local.set $at (local.get $shares))
    (loop $keys
      (local.set $sum (v128.const i32x4 0 0 0 0))
      (local.set $i (i32.const 0))
      (loop $four
        (local.set $sum (f32x4.add (local.get $sum) (f32x4.mul
          (v128.load (i32.add (local.get $q) (local.get $i)))
          (v128.load (i32.add (local.get $key) (local.get $i))))))
        (br_if $four (i32.lt_u
          (local.tee $i (i32.add (local.get $i) (i32.const 16))) (local.get $bytes))))
      (f32.store (local.get $at) (local.tee $score (call $sum (local.get $sum))))
      (local.set $most (f32.max (local.get $most) (local.get $score)))
      (local.set $key (i32.add (local.get $key) (local.get $stride)))
      (br_if $keys (i32.lt_u
        (local.tee $at (i32.add (local.get $at) (i32.const 4))) (local.get $end))))
    (v128.store (local.get $end) (f32x4.splat (f32.const -inf)))  ;; pad the scores to a multiple of four
    (local.set $sum (v128.const i32x4 0 0 0 0))
    (local.set $at (local.get $shares))
    (loop $scores
      (local.set $part (call $exp
        (f32x4.sub (v128.load (local.get $at)) (f32x4.splat (local.get $most)))))
      (v128.store (local.get $at) (local.get $part))
      (local.set $sum (f32x4.add (local.get $sum) (local.get $part)))
      (br_if $scores (i32.lt_u
        (local.tee $at (i32.add (local.get $at) (i32.const 16))) (local.get $end))))
    (local.set $score (f32.div (f32.const 1) (call $sum (local.get $sum))))
    (local.set $i (i32.const 0))
    (loop $four_of_a_value
      (local.set $sum (v128.const i32x4 0 0 0 0))
      (local.set $at (local.get $shares))
      (local.set $from (i32.add (local.get $value) (local.get $i)))
      (loop $values
        (local.set $sum (f32x4.add (local.get $sum) (f32x4.mul
          (v128.load32_splat (local.get $at)) (v128.load (local.get $from)))))
        (local.set $from (i32.add (local.get $from) (local.get $stride)))
        (br_if $values (i32.lt_u
          (local.tee $at (i32.add (local.get $at) (i32.const 4))) (local.get $end))))
      (v128.store (i32.add (local.get $out) (local.get $i))
        (f32x4.mul (local.get $sum) (f32x4.splat (local.get $score))))
      (br_if $four_of_a_value (i32.lt_u
        (local.tee $i (i32.add (local.get $i) (i32.const 16))) (local.get $bytes)))))

  ;; Returns the sum of those of x, `count` (of 4) numbers, that are larger than `least`
  (func (export "above") (param $x i32) (param $count i32) (param $least f32) (result f32)
    (local $end i32) (local $part v128) (local $sum v128)
    (local.set $end (i32.add (local.get $x) (i32.shl (local.get $count) (i32.const 2))))
    (loop $four
      (local.set $part (v128.load (local.get $x)))
      (local.set $sum (f32x4.add (local.get $sum) (v128.and (local.get $part)
        (f32x4.gt (local.get $part) (f32x4.splat (local.get $least))))))
      (br_if $four (i32.lt_u
        (local.tee $x (i32.add (local.get $x) (i32.const 16))) (local.get $end))))
    (call $sum (local.get $sum)))

  ;; out = exp(factor * (x - most)), `count` (of 4) numbers; returns their sum
  (func (export "exponentials")
    (param $x i32) (param $out i32) (param $count i32) (param $most f32) (param $factor f32) (result f32)
    (local $end i32) (local $sum v128) (local $part v128)
    (local.set $end (i32.add (local.get $x) (i32.shl (local.get $count) (i32.const 2))))
    (loop $four
      (local.set $part (call $exp (f32x4.mul (f32x4.splat (local.get $factor))
        (f32x4.sub (v128.load (local.get $x)) (f32x4.splat (local.get $most))))))
      (v128.store (local.get $out) (local.get $part))
      (local.set $sum (f32x4.add (local.get $sum) (local.get $part)))
      (local.set $out (i32.add (local.get $out) (i32.const 16)))
      (br_if $four (i32.lt_u
        (local.tee $x (i32.add (local.get $x) (i32.const 16))) (local.get $end))))
    (call $sum (local.get $sum))))
