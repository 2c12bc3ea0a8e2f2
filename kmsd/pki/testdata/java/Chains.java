import java.io.BufferedReader;
import java.io.FileInputStream;
import java.io.FileReader;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.security.Provider;
import java.security.Security;
import java.security.cert.CertPath;
import java.security.cert.CertPathValidator;
import java.security.cert.CertificateFactory;
import java.security.cert.PKIXParameters;
import java.security.cert.TrustAnchor;
import java.security.cert.X509Certificate;
import java.util.ArrayList;
import java.util.Collections;
import java.util.Date;
import java.util.List;
import org.bouncycastle.asn1.x509.Extension;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.openssl.PEMParser;
import org.bouncycastle.operator.jcajce.JcaContentVerifierProviderBuilder;
import org.bouncycastle.pkcs.PKCS10CertificationRequest;

/**
 * Judges chains and requests. Each line of standard input is one of
 *
 *   NAME chain SECONDS FILE    a PEM file, leaf first, the root last, at a time in seconds since 1970
 *   NAME request FILE          a PEM file
 *
 * and is answered by NAME and what was found: of a chain the verdict of BouncyCastle and of the JDK, and the facts of the leaf.
 */
public class Chains {
    public static void main(String[] args) throws Exception {
        Provider bouncy = new BouncyCastleProvider();
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = in.readLine()) != null; ) {
            String[] words = line.split(" ");
            String answer = words[1].equals("chain")
                    ? "bouncy=" + judge(bouncy, words) + " jdk=" + judge(null, words) + facts(bouncy, words[3])
                    : request(bouncy, words[2]);
            System.out.println(words[0] + " " + answer);
        }
    }

    static List<X509Certificate> read(Provider provider, String file) throws Exception {
        CertificateFactory factory = provider == null ? CertificateFactory.getInstance("X.509") : CertificateFactory.getInstance("X.509", provider);
        List<X509Certificate> chain = new ArrayList<>();
        try (InputStream in = new FileInputStream(file)) {
            for (Object c : factory.generateCertificates(in)) {
                chain.add((X509Certificate) c);
            }
        }
        return chain;
    }

    static String judge(Provider provider, String[] words) {
        try {
            List<X509Certificate> chain = read(provider, words[3]);
            X509Certificate root = chain.remove(chain.size() - 1);
            CertificateFactory factory = provider == null ? CertificateFactory.getInstance("X.509") : CertificateFactory.getInstance("X.509", provider);
            CertPath path = factory.generateCertPath(chain);
            PKIXParameters parameters = new PKIXParameters(Collections.singleton(new TrustAnchor(root, null)));
            parameters.setRevocationEnabled(false);
            parameters.setDate(new Date(1000 * Long.parseLong(words[2])));
            CertPathValidator validator = provider == null ? CertPathValidator.getInstance("PKIX") : CertPathValidator.getInstance("PKIX", provider);
            validator.validate(path, parameters);
            return "valid";
        } catch (Exception e) {
            return e.getClass().getSimpleName();
        }
    }

    static String facts(Provider provider, String file) throws Exception {
        X509Certificate leaf = read(provider, file).get(0);
        StringBuilder usage = new StringBuilder();
        for (boolean bit : leaf.getKeyUsage()) {
            usage.append(bit ? '1' : '0');
        }
        return " serial=" + leaf.getSerialNumber().signum() + " ca=" + leaf.getBasicConstraints() + " usage=" + usage
                + " ski=" + (leaf.getExtensionValue(Extension.subjectKeyIdentifier.getId()) != null)
                + " aki=" + (leaf.getExtensionValue(Extension.authorityKeyIdentifier.getId()) != null)
                + " subject=" + leaf.getSubjectX500Principal().getName();
    }

    static String request(Provider provider, String file) throws Exception {
        try (PEMParser parser = new PEMParser(new FileReader(file))) {
            PKCS10CertificationRequest request = (PKCS10CertificationRequest) parser.readObject();
            boolean valid = request.isSignatureValid(new JcaContentVerifierProviderBuilder().setProvider(provider).build(request.getSubjectPublicKeyInfo()));
            return (valid ? "valid " : "invalid ") + request.getSubject();
        }
    }
}
