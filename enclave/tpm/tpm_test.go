package tpm

import (
	"testing"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/enclavetest"
)

func conform(t *testing.T, c Config, a enclave.Auth, wrong ...enclave.Auth) {
	enclavetest.Run(t, func(t *testing.T) enclavetest.Device {
		s := startSimulator(t)
		return enclavetest.Device{
			Open:  func(t *testing.T) enclave.Enclave { return s.open(c) },
			Auth:  a,
			Wrong: wrong,
		}
	})
}

func TestConformanceSealed(t *testing.T) { conform(t, Config{}, enclave.Auth{}) }
func TestConformanceAgreed(t *testing.T) { conform(t, Config{Guard: Agreed}, enclave.Auth{}) }
func TestConformancePCRs(t *testing.T)   { conform(t, Config{PCRs: []int{7}}, enclave.Auth{}) }

func TestConformancePIN(t *testing.T) {
	conform(t, Config{PIN: []byte("4711")}, pin("4711"), pin("4712"), pin("a PIN that is longer than an auth value may be"))
}

func TestConformanceAgreedPINAndPCRs(t *testing.T) {
	conform(t, Config{Guard: Agreed, PIN: []byte("4711"), PCRs: []int{0, 7, 23}}, pin("4711"), pin("471"))
}
