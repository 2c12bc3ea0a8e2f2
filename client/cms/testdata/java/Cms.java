import java.io.BufferedReader;
import java.io.File;
import java.io.FileInputStream;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.PrivateKey;
import java.security.Provider;
import java.security.Security;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.ArrayList;
import java.util.List;
import org.bouncycastle.asn1.cms.CMSAttributes;
import org.bouncycastle.asn1.pkcs.PKCSObjectIdentifiers;
import org.bouncycastle.cert.X509CertificateHolder;
import org.bouncycastle.cert.jcajce.JcaCertStore;
import org.bouncycastle.cms.CMSProcessableFile;
import org.bouncycastle.cms.CMSSignedData;
import org.bouncycastle.cms.CMSSignedDataGenerator;
import org.bouncycastle.cms.SignerInformation;
import org.bouncycastle.cms.jcajce.JcaSignerInfoGeneratorBuilder;
import org.bouncycastle.cms.jcajce.JcaSimpleSignerInfoVerifierBuilder;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.operator.jcajce.JcaContentSignerBuilder;
import org.bouncycastle.operator.jcajce.JcaDigestCalculatorProviderBuilder;

/**
 * The other side of CMS signatures: BouncyCastle. Each line of standard input is one of
 *
 *   NAME verify SIGNATURE CONTENT
 *   NAME sign KEY TYPE CHAIN ALGORITHM CONTENT OUT    KEY in PKCS#8 DER, of a type for KeyFactory; CHAIN in PEM, leaf first
 *
 * and is answered by NAME and what came of it.
 */
public class Cms {
    public static void main(String[] args) throws Exception {
        Provider bouncy = new BouncyCastleProvider();
        Security.addProvider(bouncy);
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = in.readLine()) != null; ) {
            String[] word = line.split(" ");
            String answer;
            try {
                answer = word[1].equals("verify") ? verify(word[2], word[3]) : sign(word);
            } catch (Exception e) {
                answer = "error " + e;
            }
            System.out.println(word[0] + " " + answer.replace('\n', ' '));
        }
    }

    static String verify(String signature, String content) throws Exception {
        CMSSignedData data = new CMSSignedData(new CMSProcessableFile(new File(content)), Files.readAllBytes(Path.of(signature)));
        StringBuilder answer = new StringBuilder();
        for (SignerInformation signer : data.getSignerInfos().getSigners()) {
            X509CertificateHolder leaf = (X509CertificateHolder) data.getCertificates().getMatches(signer.getSID()).iterator().next();
            boolean valid = signer.verify(new JcaSimpleSignerInfoVerifierBuilder().setProvider("BC").build(leaf));
            answer.append(valid ? "valid" : "invalid");
            answer.append(" certificates=").append(data.getCertificates().getMatches(null).size());
            answer.append(" named=").append(signer.getSignedAttributes().get(PKCSObjectIdentifiers.id_aa_signingCertificateV2) != null);
            answer.append(" time=").append(signer.getSignedAttributes().get(CMSAttributes.signingTime) != null);
        }
        return answer.toString();
    }

    static String sign(String[] word) throws Exception {
        PrivateKey key = KeyFactory.getInstance(word[3], "BC").generatePrivate(new PKCS8EncodedKeySpec(Files.readAllBytes(Path.of(word[2]))));
        List<X509Certificate> chain = new ArrayList<>();
        try (InputStream in = new FileInputStream(word[4])) {
            for (Object c : CertificateFactory.getInstance("X.509", "BC").generateCertificates(in)) {
                chain.add((X509Certificate) c);
            }
        }
        CMSSignedDataGenerator generator = new CMSSignedDataGenerator();
        generator.addSignerInfoGenerator(new JcaSignerInfoGeneratorBuilder(new JcaDigestCalculatorProviderBuilder().setProvider("BC").build())
                .build(new JcaContentSignerBuilder(word[5]).setProvider("BC").build(key), chain.get(0)));
        generator.addCertificates(new JcaCertStore(chain));
        CMSSignedData data = generator.generate(new CMSProcessableFile(new File(word[6])), false);
        Files.write(Path.of(word[7]), data.getEncoded());
        return "made";
    }
}
