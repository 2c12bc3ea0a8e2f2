package recovery

// Arithmetic in GF(2^8) = GF(2)[x]/(x^8+x^4+x^3+x+1), the field of FIPS 197 section 4, without tables and without branches on data.

// multiply returns a*b.
func multiply(a, b byte) byte {
	var p byte
	for range 8 {
		p ^= a & -(b & 1)
		a = a<<1 ^ 0x1b&-(a>>7)
		b >>= 1
	}
	return p
}

// invert returns 1/a as a^254, and 0 for 0.
func invert(a byte) byte {
	r := byte(1)
	for i := 7; i >= 0; i-- {
		r = multiply(r, r)
		if i > 0 { // the bits of 254 are 11111110; the exponent is no secret
			r = multiply(r, a)
		}
	}
	return r
}

// evaluate returns the value at x of the polynomial whose coefficients begin with the constant one (Horner).
func evaluate(coefficients []byte, x byte) byte {
	var y byte
	for i := len(coefficients) - 1; i >= 0; i-- {
		y = multiply(y, x) ^ coefficients[i]
	}
	return y
}

// lagrange returns the weight of the share with this index when the polynomial through all shares is taken at 0. Indices are distinct,
// not zero and not secret.
func lagrange(shares []*Share, index byte) byte {
	w := byte(1)
	for _, s := range shares {
		if s.index != index {
			w = multiply(w, multiply(s.index, invert(s.index^index)))
		}
	}
	return w
}
